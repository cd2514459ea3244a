"""What the candidates ops refuse."""

from __future__ import annotations

import torch
from torch import Tensor

from dlx.ops.candidates.reference import LAST, NUCLEUS, listed
from dlx.ops.op import FLOATS, WIDE, need, need_tensor

MOST_LISTED = 32
MOST_PAIRS = 256
MOST_FORBIDDEN = 64


def candidates_check(
    h: Tensor, head: Tensor, temp: Tensor, seed: Tensor, pos: Tensor, age: Tensor, mask: int, vocab: int,
    k: int = 0, entropy: bool = False, margin: bool = False, softcap: float = 0.0,
    bias_tok: Tensor | None = None, bias: Tensor | None = None,
    top_k: Tensor | None = None, top_p: Tensor | None = None, forbidden: Tensor | None = None,
) -> None:  # fmt: skip
    need_tensor("candidates' h", h, (None, None), FLOATS)
    need_tensor("candidates' head", head, (None, h.shape[1]), (h.dtype,))
    need(1 < vocab <= head.shape[0], "candidates' vocab", vocab, f"2 to the {head.shape[0]} rows of the head")
    _matmul("candidates'", h, mask, softcap, bias_tok, bias, forbidden)
    _rows("candidates'", h.shape[0], temp, seed, pos, age)
    _asked("candidates'", h.shape[0], k, top_k, top_p)


def partial_check(
    h: Tensor, head: Tensor, temp: Tensor, seed: Tensor, pos: Tensor, age: Tensor, mask: int, first: int, vocab: int,
    keep: int = 0, entropy: bool = False, softcap: float = 0.0,
    bias_tok: Tensor | None = None, bias: Tensor | None = None, forbidden: Tensor | None = None,
) -> None:  # fmt: skip
    need_tensor("candidates_partial's h", h, (None, None), FLOATS)
    need_tensor("candidates_partial's head", head, (None, h.shape[1]), (h.dtype,))
    need(head.shape[0] > 0, "candidates_partial's rows of the head", 0, "one at least")
    need(0 <= first < LAST, "candidates_partial's first", first, "an id, 0 or above")
    need(1 < vocab < LAST, "candidates_partial's vocab", vocab, f"2 to {LAST - 1} ids")
    powers = [0, *(2**n for n in range(1, NUCLEUS.bit_length()))]
    need(keep in powers, "candidates_partial's keep", keep, f"one of {powers}; see listed()")
    _matmul("candidates_partial's", h, mask, softcap, bias_tok, bias, forbidden)
    _rows("candidates_partial's", h.shape[0], temp, seed, pos, age)


def combine_check(
    stats: Tensor, tok: Tensor, top_z: Tensor, top_i: Tensor, temp: Tensor, seed: Tensor, pos: Tensor, age: Tensor,
    k: int = 0, entropy: bool = False, margin: bool = False, top_k: Tensor | None = None, top_p: Tensor | None = None,
) -> None:  # fmt: skip
    need_tensor("candidates_combine's stats", stats, (None, None, 5 if entropy else 4), (torch.float32,))
    T, S, _ = stats.shape
    need(S > 0, "candidates_combine's number of parts", S, "one at least")
    need_tensor("candidates_combine's tok", tok, (T, S), (torch.int32,))
    need_tensor("candidates_combine's top_z", top_z, (T, S, None), (torch.float32,))
    keep = top_z.shape[2]
    need_tensor("candidates_combine's top_i", top_i, (T, S, keep), (torch.int32,))
    _rows("candidates_combine's", T, temp, seed, pos, age)
    _asked("candidates_combine's", T, k, top_k, top_p)
    least = listed(k, margin, top_k is not None or top_p is not None)
    powers = [0, *(2**n for n in range(1, NUCLEUS.bit_length()))]
    need(keep >= least and keep in powers, "candidates_combine's length of top_z", keep, f"{least} or more of {powers}")


def _matmul(
    name: str, h: Tensor, mask: int, softcap: float, bias_tok: Tensor | None, bias: Tensor | None,
    forbidden: Tensor | None,
) -> None:  # fmt: skip
    need(h.shape[0] > 0 and h.shape[1] > 0, f"{name} shape of h", list(h.shape), "a position and a channel at least")
    need(mask >= 0, f"{name} mask", mask, "an id, 0 or above")
    need(0 <= softcap < float("inf"), f"{name} softcap", softcap, "0 (none) or above")
    need((bias_tok is None) == (bias is None), f"{name} bias_tok and bias", "one of two", "both or neither")
    if bias_tok is not None and bias is not None:
        need_tensor(f"{name} bias_tok", bias_tok, (h.shape[0], None), (torch.int32,))
        need_tensor(f"{name} bias", bias, tuple(bias_tok.shape), WIDE)
        M = bias_tok.shape[1]
        need(1 <= M <= MOST_PAIRS, f"{name} number of pairs a row", M, f"1 to {MOST_PAIRS}")
    if forbidden is not None:
        need_tensor(f"{name} forbidden", forbidden, (None,), (torch.int32,))
        F = forbidden.shape[0]
        need(1 <= F <= MOST_FORBIDDEN, f"{name} number of forbidden ids", F, f"1 to {MOST_FORBIDDEN}")


def _rows(name: str, T: int, temp: Tensor, seed: Tensor, pos: Tensor, age: Tensor) -> None:
    need_tensor(f"{name} temp", temp, (T,), WIDE)
    need_tensor(f"{name} seed", seed, (T,), (torch.int64,))
    for what, x in (("pos", pos), ("age", age)):
        need_tensor(f"{name} {what}", x, (T,), (torch.int32,))


def _asked(name: str, T: int, k: int, top_k: Tensor | None, top_p: Tensor | None) -> None:
    need(0 <= k <= MOST_LISTED, f"{name} k", k, f"0 (none) to {MOST_LISTED}")
    if top_k is not None:
        need_tensor(f"{name} top_k", top_k, (T,), (torch.int32,))
    if top_p is not None:
        need_tensor(f"{name} top_p", top_p, (T,), WIDE)
