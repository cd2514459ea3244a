"""Tiles in the shapes that the kernel wants: turned, repeated, or once for each way that takes keys of its own."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _turned(k):
    """The last two dims of [BN, D] or [WAYS, BN, D] exchanged."""
    return tl.trans(k, 0, 2, 1) if len(k.shape) == 3 else tl.trans(k)


@triton.jit
def _repeated(x, TIMES: tl.constexpr):
    """Each of x so many times."""
    return tl.reshape(tl.broadcast_to(x[:, None], (x.shape[0], TIMES)), [x.shape[0] * TIMES])


@triton.jit
def _ways(x, WAYS: tl.constexpr):
    """x once for each way: with a dim in front."""
    x = tl.expand_dims(x, 0)
    return tl.broadcast_to(x, (WAYS, x.shape[1], x.shape[2]) if len(x.shape) == 3 else (WAYS, x.shape[1]))


@triton.jit
def _lifted(q, LIFT: tl.constexpr, UPCAST: tl.constexpr, WAYS: tl.constexpr):
    """Queries as `_attend` takes them."""
    if UPCAST:
        q = q.to(tl.float32)
    if LIFT:
        q = (q * 2.0**LIFT).to(q.dtype)
    if WAYS > 1:
        q = _ways(q, WAYS)
    return q
