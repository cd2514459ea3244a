"""The roof: the bandwidth that a kernel which only reads reaches, and the rate of a large bf16 matmul."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable

import torch
import triton
import triton.language as tl


@triton.jit
def _read(x_ptr, out_ptr, BLOCK: tl.constexpr, TURNS: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    acc = tl.zeros([BLOCK], tl.float32)
    for i in range(TURNS):
        acc += tl.load(x_ptr + (pid * TURNS + i) * BLOCK + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(out_ptr + pid, tl.sum(acc, 0))


def read_bandwidth(device: torch.device, n_bytes: int = 4 << 30) -> float:
    """Bytes a second of a kernel that only reads: the best of a few shapes, median of 21 runs each."""
    x = torch.randn(n_bytes // 2, device=device, dtype=torch.bfloat16)
    best = 0.0
    for turns in (4, 8, 16):
        programs = x.numel() // (8192 * turns)
        out = torch.empty(programs, device=device)

        def read(programs: int = programs, out: torch.Tensor = out, turns: int = turns) -> None:
            _read[(programs,)](x, out, 8192, turns, num_warps=8)

        ms = statistics.median(timed(read, 21))
        best = max(best, programs * turns * 8192 * 2 / ms * 1e3)
    return best


def matmul_rate(device: torch.device, n: int = 8192) -> float:
    """Floating-point operations a second of torch.matmul on bf16 [n, n], median of 21 runs."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / statistics.median(timed(lambda: a @ b, 21)) * 1e3


def timed(fn: Callable[[], object], n: int, warm: int = 5) -> list[float]:
    """Milliseconds of each of n calls, sent without waiting in between, by device events."""
    for _ in range(warm):
        fn()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
    marks[0].record()
    for mark in marks[1:]:
        fn()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
