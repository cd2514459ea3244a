"""A step by kernel: the bytes that it must move, the time which that takes at the roof, and the time it took.

What the calls of a step must move is their ops' own `cost` for the arguments that one eager forward gives them. Which
kernels an op launches is learned by running it alone; in the trace of the captured step each call then owns the next
ones of those names, as calls that share a kernel depend on each other and keep their order. What is left over is
Inductor's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from dlx.bench.calls import Call, calls
from dlx.bench.clock import intervals, spread, there
from dlx.bench.forward import SCHEMA, longest
from dlx.bench.rates import matmul_rate, read_rate
from dlx.bench.scene import How, Scene, stand
from dlx.bench.trace import NAME, Trace, seen, trace
from dlx.provenance import provenance

STEPS = 32  # replays that are timed


def matched(run: Sequence[str], wanted: Sequence[Sequence[str]]) -> list[list[int]]:
    """For each call, where the kernels that it launches are in a run of kernels: the next free ones of their names."""
    free: dict[str, deque[int]] = {}
    for i, name in enumerate(run):
        free.setdefault(name, deque()).append(i)
    return [[free[name].popleft() for name in kernels if free.get(name)] for kernels in wanted]


@torch.no_grad()
def launched(found: Sequence[Call]) -> list[list[str]]:
    """The names of the kernels of each call; calls of one op and parameter launch the same."""
    known: dict[tuple[str, str], list[str]] = {}
    for call in found:
        if (call.op, call.of) not in known:
            call.again()
            known[call.op, call.of] = [k.name for k in seen(call.again)]
    return [known[call.op, call.of] for call in found]


def roofline(scene: Scene, how: How, command: str) -> dict[str, Any]:
    """One record: a row an op and parameter, what is left over, the gaps, and the step as a whole."""
    how = how._replace(forwards=1)
    worker = scene.worker(how, longest(scene, how, 4 * STEPS, 0))
    rates = read_rate(worker.device), matmul_rate(worker.device)
    on_gpu = worker.device.type == "cuda"
    with there(worker.device):
        at = stand(worker, scene)
        at.rewind()
        with torch.no_grad():
            ms = spread(intervals(at.turn, STEPS, worker.device))
            run = trace(at.turn) if on_gpu else None
            at.rewind()
            at.plain()
        found = calls(at, worker.graphs.commits)
        wanted = launched(found) if run else None
    rows = table(found, rates, run, wanted)
    floor_us = sum(row["floor_us"] for row in rows)
    return {
        "schema": SCHEMA,
        "what": "roofline",
        "scene": scene.describe(),
        "graphs": worker.config.graphs,
        "ms_per_forward": ms,
        "read_gbps": rates[0] / 1e9,
        "matmul_tflops": rates[1] / 1e12,
        "floor_us": floor_us,
        "of_floor": floor_us / ms["p50"] / 1e3,
        "rows": rows,
        "others": others(run, wanted) if run and wanted else None,
        "gaps_us": run.within_us() if run else None,
        "between_us": run.between_us() if run else None,
        "traced_us": sum(us for _, us in run.mean()) + run.within_us() if run else None,
        "made": provenance(command, worker.config.device),
    }


def table(
    found: Sequence[Call], rates: tuple[float, float], run: Trace | None, wanted: Sequence[Sequence[str]] | None
) -> list[dict[str, Any]]:
    """A row an op and parameter, in the order of a step: calls, bytes, floor, and microseconds if there is a trace."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for call in found:
        row = rows.setdefault(
            (call.op, call.of),
            {"op": call.op, "of": call.of, "calls": 0, "bytes": 0, "flops": 0, "floor_us": 0.0, "kernels": None,
             "us": None},
        )  # fmt: skip
        row["calls"] += 1
        row["bytes"] += call.cost.bytes
        row["flops"] += call.cost.flops
        row["floor_us"] += max(call.cost.bytes / rates[0], call.cost.flops / rates[1]) * 1e6
    if run and wanted:
        mean = run.mean()
        for call, at in zip(found, matched([name for name, _ in mean], wanted), strict=True):
            row = rows[call.op, call.of]
            row["kernels"] = (row["kernels"] or 0) + len(at)
            row["us"] = (row["us"] or 0.0) + sum(mean[i][1] for i in at)
    return list(rows.values())


def others(run: Trace, wanted: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Kernels of the step that are no op's, by name, the costliest first."""
    mean = run.mean()
    taken = {i for at in matched([name for name, _ in mean], wanted) for i in at}
    rows: dict[str, dict[str, Any]] = {}
    for i, (name, us) in enumerate(mean):
        if i not in taken:
            row = rows.setdefault(name, {"name": name[:NAME], "n": 0, "us": 0.0})
            row["n"] += 1
            row["us"] += us
    return sorted(rows.values(), key=lambda row: -row["us"])
