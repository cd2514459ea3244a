"""Rules that no engine takes, a line each that is to be named."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlx.graphs.rules import Candidates, Seen


@dataclass(frozen=True)
class Reads:
    def __call__(self, c: Candidates, w: Seen) -> Tensor:
        best = c.conf.max().item()  # here: reads a value
        return w.todo & (c.conf >= best)


@dataclass(frozen=True)
class Branches:
    def __call__(self, c: Candidates, w: Seen) -> Tensor:
        if (c.conf > 0.5).any():  # here: reads a value
            return w.todo & (c.conf > 0.5)
        return w.todo


@dataclass(frozen=True)
class Lists:
    def __call__(self, c: Candidates, w: Seen) -> Tensor:
        some = w.todo.nonzero()  # here: depends on values
        return w.todo & (len(some) > 0)


@dataclass(frozen=True)
class Selects:
    def __call__(self, c: Candidates, w: Seen) -> Tensor:
        sure = c.conf[w.todo]  # here: depends on values
        return w.todo & (c.conf >= sure.mean())


@dataclass(frozen=True)
class Copies:
    def __call__(self, c: Candidates, w: Seen) -> Tensor:
        conf = c.conf.numpy()  # here: numpy
        return torch.from_numpy(conf > 0.5)


@dataclass(frozen=True)
class Leaves:
    def __call__(self, c: Candidates, w: Seen) -> Tensor:
        conf = c.conf.cpu()  # here: copies between the device and the host
        return w.todo & (conf > 0.5).to(w.todo.device)


@dataclass(frozen=True)
class LeavesOne:
    def __call__(self, c: Candidates, w: Seen) -> Tensor:
        best = c.conf.max().to("cpu")  # here: copies between the device and the host
        return w.todo & (c.conf >= best)


@dataclass(frozen=True)
class Comes:
    def __call__(self, c: Candidates, w: Seen) -> Tensor:
        bar = torch.full(c.conf.shape[-1:], 0.5).to(c.conf.device)  # here: copies between the device and the host
        return w.todo & (c.conf > bar)


@dataclass(frozen=True)
class Number:
    """This one may run: a number of the host goes with the kernel."""

    def __call__(self, c: Candidates, w: Seen) -> Tensor:
        return w.todo & (c.conf > torch.tensor(0.5)) | (torch.arange(c.conf.shape[-1], device=c.conf.device) < 0)


@dataclass(frozen=True)
class Fails:
    def __call__(self, c: Candidates, w: Seen) -> Tensor:
        return w.todo & c.confidence  # type: ignore[attr-defined]  # here: AttributeError


@dataclass(frozen=True)
class Prints:
    def __call__(self, c: Candidates, w: Seen) -> Tensor:
        print(c.conf)  # compiled: breaks the graph
        return w.todo & (c.conf > 0.5)


@dataclass(frozen=True)
class Writes:
    def __call__(self, c: Candidates, w: Seen) -> Tensor:
        c.conf.mul_(0.5)
        return w.todo & (c.conf > 0.5)


@dataclass(frozen=True)
class Wide:
    def __call__(self, c: Candidates, w: Seen) -> Tensor:
        return c.conf * 2
