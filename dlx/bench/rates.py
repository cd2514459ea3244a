"""What this device reaches in this run: bytes read a second, floating-point operations of a large matmul a second."""

from __future__ import annotations

import statistics

import torch

from dlx.bench.clock import intervals
from dlx.ops import bench

CPU_BYTES = 64 << 20  # larger than most caches
CPU_SIZE = 512


def read_rate(device: torch.device) -> float:
    """Bytes a second that a kernel which only reads reaches."""
    if device.type != "cpu":
        return bench.read_bandwidth(device)
    x = torch.ones(CPU_BYTES // 8, dtype=torch.int64)
    return CPU_BYTES / statistics.median(intervals(x.sum, 7, device, warm=1)) * 1e3


def matmul_rate(device: torch.device) -> float:
    """Floating-point operations a second of a large torch.matmul: bf16 on a GPU, fp32 on a CPU."""
    if device.type != "cpu":
        return bench.matmul_rate(device)
    a, b = torch.ones(CPU_SIZE, CPU_SIZE), torch.ones(CPU_SIZE, CPU_SIZE)
    return 2 * CPU_SIZE**3 / statistics.median(intervals(lambda: a @ b, 7, device, warm=1)) * 1e3
