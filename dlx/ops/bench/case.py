"""A case: one op at one size, whose inputs are made when it is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dlx.ops.bench.chain import Built


class Case(NamedTuple):
    """One op at one size of one model; a step runs it in `layers` layers."""

    op: str
    shape: str
    name: str
    rows: int  # positions of a forward
    build: Callable[[torch.device], Built]
    layers: int = 1


def normal(device: torch.device, *size: int, scale: float = 1.0) -> Tensor:
    """Normal numbers in bf16."""
    return torch.randn(*size, device=device, dtype=torch.bfloat16).mul_(scale)
