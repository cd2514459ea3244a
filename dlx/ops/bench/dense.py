"""Cases that read a weight: the matmuls of a layer, and the head with the sampler behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dlx.ops import OPS
from dlx.ops.bench.case import Case, normal
from dlx.ops.bench.chain import Built, Call, copies
from dlx.ops.bench.shapes import SHAPES, Matmul, matmuls
from dlx.ops.candidates import walk
from dlx.ops.linear import squared
from dlx.ops.op import Op

LINEAR_ROWS = (4, 8, 16, 32, 64)
HEAD_ROWS = (4, 32, 64, 128)
TOP_ROWS, TOP = (4, 16, 32, 64), (1, 4, 8)  # rows, and how many of the likeliest ids a row lists
E4M3_MAX = 448.0


def linear(name: str) -> Iterator[Case]:
    """A layer's matmuls with what is fused into them, and the head as the step runs it."""
    for T in LINEAR_ROWS:
        for one in matmuls(SHAPES[name]):
            yield Case("linear", name, one.name, T, partial(_matmul, name, one, T), one.layers)
        yield Case("linear", name, "head", T, partial(_head, name, T))


def linear_fp8(name: str) -> Iterator[Case]:
    """The same matmuls with weights in e4m3, beside themselves in bf16."""
    for T in LINEAR_ROWS:
        for one in matmuls(SHAPES[name]):
            yield Case("linear_fp8", name, one.name, T, partial(_matmul_fp8, name, one, T), one.layers)


def candidates(name: str) -> Iterator[Case]:
    """The LM head fused with the sampler, greedy."""
    for T in HEAD_ROWS:
        yield Case("candidates", name, "greedy", T, partial(_head, name, T))


def candidates_topk(name: str) -> Iterator[Case]:
    """The same with lists of the likeliest ids, as rules that mix or credit them ask, beside none."""
    for T in TOP_ROWS:
        for k in TOP:
            yield Case("candidates_topk", name, f"k {k}", T, partial(_listed, name, T, k))


class Inputs(NamedTuple):
    """One matmul's inputs; `call` runs our op on a weight [N, K], in bf16 or fp8 with its scale."""

    x: Tensor
    bias: Tensor | None
    arguments: Callable[[Tensor, Tensor | None], tuple[Any, ...]]
    op: Op


def _inputs(name: str, one: Matmul, T: int, device: torch.device) -> Inputs:
    x = normal(device, T, one.K)
    if one.name.endswith(("out", "down")):
        h, gain = normal(device, T, one.N), normal(device, one.N)
        return Inputs(x, None, lambda w, scale: (x, w, h, gain, scale, None), OPS["accumulate"])
    bias = normal(device, one.N) if SHAPES[name].qkv_bias and one.name == "qkv" else None
    squares, swiglu = squared(x), one.name.endswith("gate_up")
    return Inputs(x, bias, lambda w, scale: (x, squares, w, 1e-6, swiglu, scale, bias), OPS["project"])


def _matmul(name: str, one: Matmul, T: int, device: torch.device) -> Built:
    x, bias, arguments, op = _inputs(name, one, T, device)
    n = copies(2 * one.N * one.K)
    weights = [normal(device, one.N, one.K, scale=one.K**-0.5) for _ in range(n)]
    args = [arguments(w, None) for w in weights]
    others = {"cuBLAS": lambda i: F.linear(x, weights[i], bias)}
    return Built(lambda i: op(*args[i]), others, n, op.cost(*args[0]))


def _matmul_fp8(name: str, one: Matmul, T: int, device: torch.device) -> Built:
    x, bias, arguments, op = _inputs(name, one, T, device)
    n = copies(one.N * one.K)
    wide = [normal(device, one.N, one.K, scale=one.K**-0.5) for _ in range(n)]
    args = [arguments(*in_fp8(w)) for w in wide]
    plain = [arguments(w, None) for w in wide]
    others: dict[str, Call] = {"bf16": lambda i: op(*plain[i]), "cuBLAS bf16": lambda i: F.linear(x, wide[i], bias)}
    return Built(lambda i: op(*args[i]), others, n, op.cost(*args[0]))


def in_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 [N, K], scale [N] f32) of a weight [N, K]."""
    scale = weight.abs().amax(1).float() / E4M3_MAX
    return (weight / scale[:, None]).to(torch.float8_e4m3fn), scale


class Sampled(NamedTuple):
    """A head's inputs; `args` are those of our op on one of its copies, greedy."""

    h: Tensor
    heads: list[Tensor]
    rows: tuple[Tensor, ...]
    V: int

    @staticmethod
    def of(name: str, T: int, device: torch.device) -> Sampled:
        V, E = SHAPES[name].V, SHAPES[name].E
        heads = [normal(device, V, E, scale=E**-0.5) for _ in range(copies(2 * V * E))]
        at = torch.arange(T, device=device, dtype=torch.int32)
        return Sampled(normal(device, T, E), heads, (torch.zeros(T, device=device), at.long(), at, at), V)

    def args(self, i: int, *more: Any) -> tuple[Any, ...]:
        return (self.h, self.heads[i], *self.rows, self.V - 1, self.V, *more)


def _head(name: str, T: int, device: torch.device) -> Built:
    x, op = Sampled.of(name, T, device), OPS["candidates"]
    none = (0, False, 0.0, None, None, None)
    others: dict[str, Call] = {
        "bare": lambda i: walk(x.h, x.heads[i], *x.rows, x.V - 1, 0, x.V, *none, bare=True),
        "cuBLAS": lambda i: F.linear(x.h, x.heads[i]),
        "torch": lambda i: _eager(x.h, x.heads[i]),
    }
    return Built(lambda i: op(*x.args(i)), others, len(x.heads), op.cost(*x.args(0)))


def _listed(name: str, T: int, k: int, device: torch.device) -> Built:
    x, op = Sampled.of(name, T, device), OPS["candidates"]
    others: dict[str, Call] = {"k 0": lambda i: op(*x.args(i)), "torch": lambda i: _eager(x.h, x.heads[i], k)}
    return Built(lambda i: op(*x.args(i, k)), others, len(x.heads), op.cost(*x.args(0, k)))


def _eager(h: Tensor, head: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """The head and a greedy sampler as torch has them: matmul, softmax in fp32, top-k."""
    return torch.topk(F.linear(h, head).float().softmax(-1), k)
