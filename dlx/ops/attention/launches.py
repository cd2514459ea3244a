"""How the kernel is launched: tile sizes and splits for given sizes, and the memory that the splits share."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from dlx.ops.attention.fp8 import fp8
from dlx.ops.attention.kernels import _attention
from dlx.ops.op import DEBUG, launch_options, locks, need, power_of_two, processors, shared_limit
from dlx.ops.tuned import tuned

MOST_SPLITS = 64
SHORT = 2048  # keys up to which sums over more than a few splits cost more than keys that several programs read
WGMMA_BYTES = 200 << 10  # GPUs with more shared memory a program than this have matmuls that read it (sm_90)
LOG2_E = 1.4426950408889634


class Launch(NamedTuple):
    """A launch configuration: query rows and keys a tile, splits of the keys, warps, pipeline stages; full: tiles of
    keys that all queries see have a loop of their own, without masks."""

    BM: int
    BN: int
    splits: int
    warps: int
    stages: int
    full: bool = False


def shared_bytes(config: Launch, D: int, q_bytes: int, kv_bytes: int, wgmma: bool) -> int:
    """Shared memory that a program takes at most: queries, weights, buffers of keys and values; after them the sums."""
    BM, BN = config.BM, config.BN
    buffers = config.stages if wgmma and BM >= 64 else max(1, config.stages - 1)
    fp8 = kv_bytes < q_bytes
    keys = 2 * buffers * BN * (D * kv_bytes + 4 * fp8) + 2048  # 4: a scale
    return max(BM * (D + BN) * q_bytes + keys + 2 * BN * D * q_bytes * fp8, BM * D * 4)


@cache
def choose(
    B: int, C: int, H: int, G: int, D: int, keys: int, q_bytes: int, kv_bytes: int, processors: int, shared: int
) -> Launch:
    """The recorded configuration for these sizes, or the default: enough splits to fill the GPU, deep pipelines.

    keys  that the page table has room for: the context itself is not known when a graph is captured
    """
    wgmma = shared >= WGMMA_BYTES
    sizes = D, q_bytes, kv_bytes, wgmma
    rows = C * (H // G)
    fp8 = kv_bytes < q_bytes == 2
    widest = {16: 128, 32: 128, 64: 128, 128: 128, 256: 64}.get(D, 32)
    BM = min(widest if wgmma else min(widest, 64), max(16, power_of_two(rows)))
    BN = 32 if D > 256 or (not wgmma and BM == 64) else max(16, min(64, 8192 // D))

    def programs(m: int) -> int:
        return B * G * -(-rows // m)

    deep = min(128, 16384 // D)  # keys of a tile of 16 rows, for few turns
    short, shorter = keys <= SHORT, 2 * keys <= SHORT
    many = 2 * programs(BM) >= processors  # enough without splits
    # programs of 16 rows that read all keys again cost less than a sum over splits
    again = shorter or (short and rows > 32)
    again = again and (5 if shorter else 3) * programs(16) >= processors
    alone = many or again
    few = short and rows > 32 and not alone and not fp8  # programs of 16 rows, with splits for one a processor
    if few or (again and not many):
        BM, BN = 16, deep
    elif not many:
        BM = 16 if rows <= 32 else min(BM, 64)
    elif BM == 16 and not fp8:
        BN = deep
    elif short and not fp8:  # small programs end together
        BM, BN = min(BM, 64), min(BN, 32 if 64 < rows <= 128 and shorter else 64)

    def fits(config: Launch) -> bool:
        splits = config.splits == power_of_two(config.splits) <= min(MOST_SPLITS, processors)
        return splits and min(config.BM, config.BN) >= 16 and shared_bytes(config, *sizes) <= shared

    def warps(m: int, n: int) -> int:
        return 8 if m * D >= 128 * 128 or D > 256 else 2 if m == 16 and n <= 64 and not (alone or fp8) else 4

    def pipelines(m: int, n: int) -> tuple[int, ...]:
        if n > 64 and many and m == 16:
            return (2,)  # several programs a processor hide more than a deep pipeline of one
        return (4, 3, 2) if m <= 32 and n <= 64 and not fp8 else (3, 2)

    smaller = [
        Launch(m, n, 1, warps(m, n), stages)
        for m in (BM, BM // 2, BM // 4)
        for n in (BN, BN // 2, BN // 4)
        for stages in pipelines(m, n)
    ]
    config = next(filter(fits, smaller), Launch(16, 16, 1, 4, 2))
    room = 1 if alone else processors if few else 2 * processors
    most = min(MOST_SPLITS, processors, -(-keys // 64), room // programs(config.BM))
    splits = power_of_two(most + 1) // 2 if most > 0 else 1
    config = config._replace(splits=splits, full=BM > 16 and (splits == 1 or rows > 64 or fp8))
    return tuned("attention", (rows, B * G, D, power_of_two(keys), q_bytes, kv_bytes), config, fits)


def kernel(
    q: Tensor,
    kv: Tensor,
    pages: Tensor,
    seen: Tensor,
    scale: float,
    first: Tensor | None = None,
    hole: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    B, C, H, D = q.shape
    keys = pages.shape[1] * kv.shape[2]
    sizes = B, C, H, kv.shape[3], D, keys, q.element_size(), kv.element_size()
    return launch(q, kv, pages, seen, scale, first, hole, scales, choose(*sizes, processors(q), shared_limit(q)))


def launch(
    q: Tensor,
    kv: Tensor,
    pages: Tensor,
    seen: Tensor,
    scale: float,
    first: Tensor | None,
    hole: Tensor | None,
    scales: Tensor | None,
    config: Launch,
) -> Tensor:
    """Run the kernel under an explicit configuration."""
    B, C, H, D = q.shape
    _, P, S, G, _ = kv.shape
    need(D >= 16 and D & (D - 1) == 0, "attention's head dim", D, "a power of two from 16 on")
    splits = config.splits
    tiles = -(-C * (H // G) // config.BM)
    lock = locks(q.device)
    need(splits == 1 or tiles * G * B <= lock.numel(), "attention's sums to lock", tiles * G * B, f"{lock.numel()}")
    out = torch.empty_like(q)
    part, stat = out, out
    if splits > 1:
        part = torch.empty(B, C, H, splits, D, device=q.device, dtype=torch.float32)
        stat = torch.empty(2, B, C, H, splits, device=q.device, dtype=torch.float32)
    pdl, options = launch_options(q)
    kind, lifted = fp8(kv, q)
    # bytes for integers to work on: Triton would have fp8 cast first and moved then
    numbers = kv if kind is None else kv.view(torch.uint8)
    _attention[(tiles * splits, G, B)](
        q, numbers, pages, seen, first, hole, scales, out, part, stat, lock,
        scale * LOG2_E * 2.0**lifted, C, pages.shape[1], P, numbers.stride(0), stat.stride(0),
        G, H // G, S, D, config.BM, config.BN, splits, config.full, kind, lifted,
        q.is_cuda, DEBUG, pdl, q.dtype == torch.float32, not q.is_cuda,
        num_warps=config.warps, num_stages=config.stages, **options,
    )  # fmt: skip
    return out
