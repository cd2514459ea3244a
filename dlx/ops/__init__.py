"""DEVICE: the kernels, one op a file (two matmuls share one), each an `Op` value; none of it runs in a replay."""

from __future__ import annotations

from dlx.ops.attention import attention
from dlx.ops.candidates import candidates, candidates_combine, candidates_partial
from dlx.ops.kv_store import kv_store
from dlx.ops.linear import accumulate, project
from dlx.ops.moe import experts, route
from dlx.ops.op import Op
from dlx.ops.positions import positions

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        attention, candidates, candidates_partial, candidates_combine, kv_store, project, accumulate, positions,
        route, experts,
    )
}  # fmt: skip
