"""Where the positions of a forward are, and how many leading keys each sees.

    pos[b, c] = start[b] + c
    seen[b, c] = given[b]                       where pos[b, c] < given[b]            (a prompt that sees itself whole)
                 start[b] + (c // L + 1) · L    else where c // L < open[b], else 0   (block-causal)

start  [B]     int32   absolute position of a row's first token, a multiple of L
open   [B]     int32   leading blocks that take part
given  [B]     int32   None: 0, block-causal throughout
→ pos, seen  [B, blocks · L]  int32
Work   writes 2·B·C ints

An op, not a few lines of torch: Inductor would compute them anew for every layer that takes them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dlx.ops.op import Cost, Op, launch_options, need, need_tensor

BLOCK = 256


def reference(start: Tensor, open: Tensor, L: int, blocks: int, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
    at = torch.arange(blocks * L, dtype=torch.int32, device=start.device)
    part = at // L < open[:, None]
    pos, seen = start[:, None] + at, torch.where(part, start[:, None] + (at // L + 1) * L, 0)
    return pos, seen if given is None else torch.where(pos < given[:, None], given[:, None], seen)


@triton.jit
def _positions(
    start_ptr, open_ptr, given_ptr, pos_ptr, seen_ptr, C, L, BLOCK: tl.constexpr, GIVEN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.program_id(1)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(start_ptr + b)
    block = c // L
    seen = tl.where(block < tl.load(open_ptr + b), start + (block + 1) * L, 0)
    if GIVEN:
        given = tl.load(given_ptr + b)
        seen = tl.where(start + c < given, given, seen)
    tl.store(pos_ptr + b * C + c, start + c, mask=c < C)
    tl.store(seen_ptr + b * C + c, seen, mask=c < C)


def kernel(start: Tensor, open: Tensor, L: int, blocks: int, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
    pos, seen = fake(start, open, L, blocks)
    pdl, options = launch_options(start)
    grid = (-(-pos.shape[1] // BLOCK), pos.shape[0])
    some = start if given is None else given
    _positions[grid](
        start, open, some, pos, seen, pos.shape[1], L, BLOCK, given is not None, pdl, num_warps=4, **options
    )  # fmt: skip
    return pos, seen


def fake(start: Tensor, open: Tensor, L: int, blocks: int, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
    pos = start.new_empty(start.shape[0], blocks * L)
    return pos, torch.empty_like(pos)


def check(start: Tensor, open: Tensor, L: int, blocks: int, given: Tensor | None = None) -> None:
    need_tensor("positions' start", start, (None,), (torch.int32,))
    need_tensor("positions' open", open, (start.shape[0],), (torch.int32,))
    if given is not None:
        need_tensor("positions' given", given, (start.shape[0],), (torch.int32,))
    need(L >= 1 and blocks >= 1, "positions' L and blocks", (L, blocks), "1 or above each")


def cases() -> dict[str, tuple[Any, ...]]:
    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    return {
        "three rows": (ints(0, 8, 96), ints(2, 0, 3), 4, 3),
        "a long prompt": (ints(64), ints(17), 16, 20),
        "prompts that see themselves": (ints(0, 64, 32, 8), ints(2, 1, 0, 3), 8, 4, ints(13, 96, 30, 8)),
    }


def cost(start: Tensor, open: Tensor, L: int, blocks: int, given: Tensor | None = None) -> Cost:
    return Cost(4 * start.numel() * L * blocks, 8 * start.numel() * (L * blocks + 1))


positions = Op("positions", reference, kernel, fake, check, cases, cost)
