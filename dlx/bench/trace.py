"""The kernels of a step, from a trace: which, how many, and what part of the step's time each one has for itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch._C._autograd import DeviceType

from dlx.graphs.nodes import CHOICE

CALLS = 8  # that are traced
NAME = 120  # characters of a kernel's name in a record


class Kernel(NamedTuple):
    """One run of a kernel on the device, in microseconds of the trace's clock."""

    name: str
    start: float
    end: float


class Owned(NamedTuple):
    """The share of a stretch that one kernel has for itself.

    Dependent launches overlap: a kernel starts early and waits for those before it. What it does alone begins where the
    last of those has ended; so own times and gaps add up to the stretch.
    """

    name: str
    own_us: float
    gap_us: float  # before it, in which nothing ran


class Trace(NamedTuple):
    """The kernels of `n` calls of one graph, in order."""

    kernels: list[Owned]
    n: int

    def calls(self) -> list[list[Owned]]:
        """Those of each call; [] if they cannot be told apart: the trace has lost some."""
        each, rest = divmod(len(self.kernels), self.n)
        starts = [i for i, k in enumerate(self.kernels) if k.name.startswith(CHOICE)]
        if not starts and each and not rest:
            starts = [*range(0, len(self.kernels), each)]
        if len(starts) != self.n or starts[0]:
            return []
        return [self.kernels[i:end] for i, end in zip(starts, [*starts[1:], None], strict=True)]

    def steps(self) -> list[list[Owned]]:
        """Those of the calls of the commonest kind; [] if calls differ though the graph has no choice."""
        kinds = Counter(tuple(k.name for k in call) for call in self.calls())
        if len(kinds) > 1 and not self.kernels[0].name.startswith(CHOICE):
            return []
        ((common, _),) = kinds.most_common(1) or [((), 0)]
        return [call for call in self.calls() if tuple(k.name for k in call) == common]

    def between_us(self) -> float | None:
        """The mean gap between the last kernel of a call and the first of the next."""
        gaps = [call[0].gap_us for call in self.calls()[1:]] if self.steps() else []
        return sum(gaps) / len(gaps) if gaps else None

    def within_us(self) -> float:
        """Gaps inside a call, mean of the calls."""
        steps = self.steps()
        return sum(k.gap_us for step in steps for k in step[1:]) / max(1, len(steps))

    def mean(self) -> list[tuple[str, float]]:
        """(name, own microseconds) of each kernel of a call, in order, mean of the calls."""
        steps = self.steps()
        return [(runs[0].name, sum(k.own_us for k in runs) / len(runs)) for runs in zip(*steps, strict=True)]

    def table(self) -> list[dict[str, Any]]:
        """Kernels by name, the costliest first: launches of a call of the commonest kind, own microseconds a call."""
        rows: dict[str, dict[str, Any]] = {}
        for k in self.kernels:
            row = rows.setdefault(k.name, {"name": k.name[:NAME], "n": 0, "us": 0.0})
            row["n"] += 1
            row["us"] += k.own_us / self.n
        common = Counter(k.name for k in self.steps()[0]) if self.steps() else None
        for name, row in rows.items():
            row["n"] = row["n"] / self.n if common is None else common[name]
        return sorted(rows.values(), key=lambda row: -row["us"])


def owned(kernels: Sequence[Kernel]) -> list[Owned]:
    """Part a stretch among its kernels, in the order of their starts."""
    found, reached = [], None
    for k in sorted(kernels, key=lambda k: (k.start, k.end)):
        since = k.start if reached is None else max(k.start, reached)
        found.append(Owned(k.name, max(0.0, k.end - since), 0.0 if reached is None else max(0.0, k.start - reached)))
        reached = k.end if reached is None else max(reached, k.end)
    return found


def trace(fn: Callable[[], object], n: int = CALLS) -> Trace:
    """Trace n calls of fn on the GPU, sent without waiting in between."""
    fn()
    torch.cuda.synchronize()
    return Trace(owned(seen(lambda: [fn() for _ in range(n)])), n)


def seen(fn: Callable[[], object]) -> list[Kernel]:
    """What runs on the GPU during fn: kernels, copies and fills, in the order of their starts."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as tool:
        fn()
        torch.cuda.synchronize()
    on_gpu = [e for e in tool.events() or [] if e.device_type == DeviceType.CUDA]
    runs = [Kernel(e.name, e.time_range.start, e.time_range.end) for e in on_gpu]
    return sorted(runs, key=lambda k: (k.start, k.end))


def a_layer(table: Sequence[dict[str, Any]], layers: int) -> int:
    """Kernels of one layer: those that a step runs at least once a layer."""
    return sum(int(row["n"]) // layers for row in table)
