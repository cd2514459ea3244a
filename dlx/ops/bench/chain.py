"""Timing by CUDA-graph replay of a chain of calls on rotating inputs, contestants interleaved."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from dlx.ops.op import Cost

COLD_BYTES = 160_000_000  # what one turn through the inputs reads at least: an L2 cache holds 50 MB
LONGEST = 4096  # calls of a chain
CHAIN_US = 600.0  # what a chain should take, so that its start does not show
ROUNDS = 9

NONE: Mapping[str, Any] = MappingProxyType({})
Call = Callable[[int], object]  # runs on the i-th set of inputs


class Built(NamedTuple):
    """What is timed: an op on so many sets of inputs, and what else computes the same."""

    own: Call
    others: Mapping[str, Call]
    copies: int
    cost: Cost
    facts: Mapping[str, float | int | str] = NONE  # what the inputs turned out to be: experts touched, say


class Took(NamedTuple):
    """Microseconds a call: the median over the rounds, and the extremes."""

    us: float
    low_us: float
    high_us: float


def copies(read_bytes: int) -> int:
    """How many sets of inputs make one turn through them larger than any cache."""
    return max(2, min(LONGEST, -(-COLD_BYTES // max(1, read_bytes))))


def length(built: Built, bytes_per_s: float = 3e12, flops_per_s: float = 7e14) -> int:
    """Calls in a chain: whole turns through the inputs, until the chain is long enough to be timed."""
    us = max(2.0, built.cost.bytes / bytes_per_s * 1e6, built.cost.flops / flops_per_s * 1e6)
    turns = max(1, round(CHAIN_US / us / built.copies))
    return max(2, min(LONGEST, turns * built.copies))


def captured(call: Call, copies: int, n: int) -> torch.cuda.CUDAGraph:
    """A graph of n calls, through the sets of inputs in turn."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(2):
            call(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(n):
            call(i % copies)
    return graph


def interleaved(calls: Mapping[str, Call], copies: int, n: int) -> dict[str, Took]:
    """Microseconds a call of each contestant."""
    return turns({name: captured(call, copies, n) for name, call in calls.items()}, n)


def turns(graphs: Mapping[str, torch.cuda.CUDAGraph], n: int, rounds: int = ROUNDS) -> dict[str, Took]:
    """Microseconds a call of graphs of n calls: they take turns, so that what slows the device slows them all."""
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in graphs}
    for graph in graphs.values():
        graph.replay()
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            marks[name].append((start, stop))
    torch.cuda.synchronize()
    each = {name: [a.elapsed_time(b) * 1e3 / n for a, b in pairs] for name, pairs in marks.items()}
    return {name: Took(statistics.median(us), min(us), max(us)) for name, us in each.items()}


def extra_bytes(call: Call) -> int:
    """The most memory that a call holds beyond what was there before it, its result included."""
    call(0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
