"""Which kernel runs a matmul, and under which launch configuration."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from dlx.ops.linear import stream, tiles
from dlx.ops.linear.stream import Stream
from dlx.ops.linear.tiles import Tiles
from dlx.ops.op import processors, shared_limit
from dlx.ops.tuned import tuned

SPARE_BYTES = 4 << 10  # of shared memory, for what a program exchanges among its warps


def run(
    kind: int, x: Tensor, weight: Tensor, squares: Tensor | None, h: Tensor | None, gain: Tensor | None, eps: float,
    scale: Tensor | None, bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """kind 0 projects, 1 with SwiGLU, 2 accumulates."""
    (T, K), N, limit = x.shape, weight.shape[0], shared_limit(x) - SPARE_BYTES
    if stream.takes(x, weight):
        config = choose_stream(kind, T, N, K, weight.element_size(), limit)
        return stream.launch(kind, x, weight, squares, h, gain, eps, scale, bias, config)
    config = choose_tiles(T, N, K, x.element_size(), weight.element_size(), processors(x), limit)
    return tiles.launch(kind, x, weight, squares, h, gain, eps, scale, bias, config)


@cache
def choose_stream(kind: int, T: int, N: int, K: int, itemsize: int, limit: int) -> Stream:
    """The recorded configuration, else 60 programs or more, each with a ring of all the shared memory there is."""
    swiglu = kind == 1

    def fits(config: Stream) -> bool:
        tiled = config.SUB in (64, 128) and config.BK >= 64
        return tiled and stream.shared_bytes(config, T, swiglu, itemsize) <= limit

    # fp8: tiles of 256 while three fit, and two programs a processor that take turns
    BK, share, most, least = (256, limit // 2, 4096, 120) if itemsize == 1 else (128, limit, 8192, 60)
    if 3 * stream.shared_bytes(Stream(64, BK, 1, 1, 1), T, swiglu, itemsize) > share:
        BK = 128
    programs = -(-(N // 2 if swiglu else N) // 64)
    splits = 1
    while K // (splits * 2) >= 512 and (programs * splits < least or K // splits > most):
        splits *= 2
    tile = stream.shared_bytes(Stream(64, BK, 1, 1, 1), T, swiglu, itemsize)
    default = Stream(64, BK, splits, max(2, min(12, share // tile)), 14)
    return tuned("linear", (T, kind, N, K, itemsize), default, fits)


@cache
def choose_tiles(T: int, N: int, K: int, itemsize: int, w_itemsize: int, processors: int, limit: int) -> Tiles:
    """Tiles of 64 rows; K split in two where tiles are few, a shorter pipeline where they are many."""
    count = -(-N // 64) * -(-T // 64)
    splits = 2 if count < 0.7 * processors and K >= 1024 else 1
    stages = 5 if count * splits <= processors else 3
    one = tiles.shared_bytes(Tiles(64, 128, 1, 4, 1), T, itemsize, w_itemsize)
    return Tiles(64, 128, splits, 4, max(1, min(stages, limit // one)))
