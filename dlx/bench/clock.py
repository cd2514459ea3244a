"""Clocks: by device events where there is a GPU, by the host's clock where the host computes."""

from __future__ import annotations

import itertools
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from dlx.ops.bench import timed

if TYPE_CHECKING:
    from dlx.worker import Worker

SYNC = "called a synchronizing CUDA operation"  # torch's words
Mark = torch.cuda.Event | float


def mark(device: torch.device) -> Mark:
    """Now, in the order of the device's work."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between_ms(a: Mark, b: Mark) -> float:
    """Milliseconds from a to b, both of which have passed."""
    if isinstance(a, torch.cuda.Event) and isinstance(b, torch.cuda.Event):
        return a.elapsed_time(b)
    assert isinstance(a, float) and isinstance(b, float), "marks of one device"
    return (b - a) * 1e3


def intervals(fn: Callable[[], object], n: int, device: torch.device, warm: int = 5) -> list[float]:
    """Milliseconds of each of n calls, sent without waiting in between."""
    if device.type != "cpu":
        return timed(fn, n, warm)
    for _ in range(warm):
        fn()
    marks = [time.perf_counter()]
    for _ in range(n):
        fn()
        marks.append(time.perf_counter())
    return [(b - a) * 1e3 for a, b in itertools.pairwise(marks)]


def spread(ms: Sequence[float]) -> dict[str, float | int]:
    """Median and 99th percentile (the largest of fewer than a hundred) of n measurements."""
    return {"p50": statistics.median(ms), "p99": sorted(ms)[int(0.99 * len(ms))], "n": len(ms)}


def there(device: torch.device) -> AbstractContextManager[object]:
    """Events, captures and Triton take the current device: make it this one."""
    return torch.cuda.device(device) if device.type != "cpu" else nullcontext()


def wait(device: torch.device) -> None:
    """Until the device has done all that it was sent."""
    if device.type != "cpu":
        torch.cuda.synchronize(device)


def peak_gib(device: torch.device) -> float:
    """The most memory that was in use since `forget_peak`; on a CPU, of the process ever."""
    if device.type != "cpu":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def forget_peak(device: torch.device) -> None:
    if device.type != "cpu":
        torch.cuda.reset_peak_memory_stats(device)


@dataclass
class Count:
    """A number that is known when its `with` block has ended."""

    n: int | None = None


@contextmanager
def counted_syncs(device: torch.device) -> Iterator[Count]:
    """Count the operations of a block that make the host wait for the device: an event waited for is none, as the
    next launch runs meanwhile. On a CPU the count stays None."""
    count = Count()
    if device.type == "cpu":
        yield count
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield count
        finally:
            torch.cuda.set_sync_debug_mode(before)
    count.n = sum(SYNC in str(w.message) for w in seen)


@dataclass
class Replays:
    """Every replay of a worker's graphs while it is watched, with its time on the device."""

    worker: Worker
    keys: list[Hashable] = field(default_factory=list)
    _marks: list[tuple[Mark, Mark]] = field(default_factory=list)

    def __enter__(self) -> Replays:
        graphs, device = self.worker.graphs, self.worker.device
        replay = graphs.replay

        def watched(key: Hashable) -> None:
            began = mark(device)
            replay(key)
            self.keys.append(key)
            self._marks.append((began, mark(device)))

        graphs.replay = watched
        return self

    def __exit__(self, *_: object) -> None:
        del self.worker.graphs.replay  # the instance's; the class keeps its own

    def ms(self, kind: str) -> list[float]:
        """Milliseconds of each replay of graphs whose key begins with `kind`, in order."""
        wait(self.worker.device)
        pairs = zip(self.keys, self._marks, strict=True)
        return [between_ms(*marks) for key, marks in pairs if isinstance(key, tuple) and key[0] == kind]
