"""A launch on its way: what the device has been told to copy to the host, and when that has landed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dlx.plan import Plan


class Flight(NamedTuple):
    """A launch whose outbox is on its way to the host."""

    plan: Plan
    outbox: Tensor  # [B, · + FACTS] int32, an Outbox packed, on the host, pinned where the device is a GPU
    windows: Tensor | None  # of watched rows, see watch.py; there too
    landed: torch.cuda.Event | None


def sent(plan: Plan, outbox: Tensor, windows: Tensor | None) -> Flight:
    """Begin the copies; nothing waits for the device."""
    if outbox.device.type == "cpu":
        return Flight(plan, outbox.clone(), windows, None)
    landed = torch.cuda.Event()
    flight = Flight(plan, _landing(outbox), None if windows is None else _landing(windows), landed)
    landed.record()
    return flight


def _landing(x: Tensor) -> Tensor:
    """Pinned memory on the host that x is on its way to."""
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    host.copy_(x, non_blocking=True)
    return host
