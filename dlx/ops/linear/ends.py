# pyright: reportAssignmentType=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false, reportGeneralTypeIssues=false
"""What the ring's kernel does before and after its loop: norms and the stream in, epilogues and sums of splits out."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _channel(acc, row, rows, scale_ptr, bias_ptr, norm, SCALE: gl.constexpr, BIAS: gl.constexpr):
    """acc [SUB, BT] · scale of the channel · norm of the position + bias of the channel."""
    if SCALE:
        acc = acc * gl.load(scale_ptr + row, mask=row < rows, other=0.0)[:, None]
    acc = acc * norm[None, :]
    if BIAS:
        acc = acc + gl.load(bias_ptr + row, mask=row < rows, other=0.0).to(gl.float32)[:, None]
    return acc


@gluon.jit
def before(squares_ptr, live_ptr, h_ptr, t, n, T, N, K, PARTS, eps, BT: gl.constexpr, BP: gl.constexpr,
            KIND: gl.constexpr, LIVE: gl.constexpr, NORM: gl.constexpr, FLAT: gl.constexpr):  # fmt: skip
    """What the end needs of positions t: (h, 1 / rms, whether they are live)."""
    h = n
    norm = gl.full([BT], 1.0, gl.float32, layout=gl.SliceLayout(0, FLAT))
    alive = t < T
    if LIVE:
        alive = gl.load(live_ptr + t, mask=t < T, other=0) > 0
    if KIND == 2:
        h = gl.load(h_ptr + t[None, :] * N + n[:, None], mask=(t < T)[None, :] & (n < N)[:, None], other=0.0)
    else:
        row = gl.convert_layout(t, gl.SliceLayout(1, NORM))
        p = gl.arange(0, BP, layout=gl.SliceLayout(0, NORM))
        inside = (row < T)[:, None] & (p < PARTS)[None, :]
        squares = gl.load(squares_ptr + row[:, None] * PARTS + p[None, :], mask=inside, other=0.0)
        norm = gl.convert_layout(gl.rsqrt(gl.sum(squares, 1) / K + eps), gl.SliceLayout(0, FLAT))
    return h, norm, alive


@gluon.jit
def finish(
    acc, up, h, gain, tile, t, norm, alive, scale_ptr, bias_ptr, out_ptr, scaled_ptr, sums_ptr, T, N, PARTS,
    SUB: gl.constexpr, KIND: gl.constexpr, SCALE: gl.constexpr, BIAS: gl.constexpr, FLAT: gl.constexpr,
):  # fmt: skip
    i = gl.arange(0, SUB, layout=gl.SliceLayout(1, FLAT))
    n = tile * SUB + i
    ok = t < T
    out_type = out_ptr.dtype.element_ty
    if KIND == 1:
        half = N // 2
        inside = ok[None, :] & (n < half)[:, None]
        gate = _channel(acc, n, half, scale_ptr, bias_ptr, norm, SCALE, BIAS)
        up = _channel(up, n, half, scale_ptr + half, bias_ptr + half, norm, SCALE, BIAS)
        z = gl.where(alive[None, :], gate / (1.0 + gl.exp(-gate)) * up, 0.0)
        gl.store(out_ptr + t[None, :] * half + n[:, None], z.to(out_type), mask=inside)
    else:
        at = t[None, :] * N + n[:, None]
        inside = ok[None, :] & (n < N)[:, None]
        y = gl.where(alive[None, :], _channel(acc, n, N, scale_ptr, bias_ptr, norm, SCALE, BIAS), 0.0)
        if KIND == 0:
            gl.store(out_ptr + at, y.to(out_type), mask=inside)
        else:
            new = (h.to(gl.float32) + y).to(out_type)
            gl.store(out_ptr + at, new, mask=inside)
            wide = gl.where(inside, new.to(gl.float32), 0.0)
            gl.store(scaled_ptr + at, (wide * gain.to(gl.float32)[:, None]).to(out_type), mask=inside)
            for part in gl.static_range(SUB // 64):
                sums = gl.sum(gl.where((i // 64 == part)[:, None], wide * wide, 0.0), 0)
                entry = tile * (SUB // 64) + part
                gl.store(sums_ptr + t * PARTS + entry, sums, mask=ok & (entry < PARTS))


@gluon.jit
def summed(slab, cell, SPLITS, SIZE: gl.constexpr, SUB: gl.constexpr, BT: gl.constexpr, FLAT: gl.constexpr):
    """The sum of the splits' tiles, in their order."""
    total = gl.zeros([SUB, BT], gl.float32, layout=FLAT)
    for split in range(SPLITS):
        total += gl.load(slab + split * SIZE + cell, cache_modifier=".cg")
    return total
