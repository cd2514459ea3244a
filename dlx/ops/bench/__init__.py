"""How fast the ops are on this device: `python -m dlx.ops.bench`; and the roof that they are measured against."""

from dlx.ops.bench.roof import matmul_rate, read_bandwidth, timed

__all__ = ["matmul_rate", "read_bandwidth", "timed"]
