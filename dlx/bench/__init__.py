"""How fast it is: a forward against its floor, many requests, the way to the first forward, a step by kernel."""

from __future__ import annotations

from dlx.bench.forward import latency
from dlx.bench.invariant import invariance
from dlx.bench.load import throughput
from dlx.bench.roof import roofline
from dlx.bench.scene import How, Scene, decode, floor_bytes, stand
from dlx.bench.start import startup

__all__ = [
    "How", "Scene", "decode", "floor_bytes", "invariance", "latency", "roofline", "stand", "startup", "throughput",
]  # fmt: skip
