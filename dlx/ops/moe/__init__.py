"""A mixture of experts: who goes where (`route`), and what the experts give (`experts`)."""

from dlx.ops.moe.experts import experts
from dlx.ops.moe.route import route

__all__ = ["experts", "route"]
