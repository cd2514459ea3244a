"""From a case to a row of the table: timed, and set against the roof of the same run."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.errors import TritonError

from dlx.errors import DlxError
from dlx.ops.bench.case import Case
from dlx.ops.bench.chain import NONE, Built, Took, extra_bytes, interleaved, length
from dlx.ops.bench.roof import matmul_rate, read_bandwidth
from dlx.ops.op import Cost, Op

HEAD = ("op", "shape", "case", "rows", "µs", "GB/s", "TFLOP/s", "of roof", "others")
# of torch and Triton, and an op's own refusals; a case that fails stops no other
FAILURES = (RuntimeError, ValueError, NotImplementedError, TritonError, DlxError)


class Roof(NamedTuple):
    """What this device reaches: bytes a second read, floating-point operations a second of a large bf16 matmul."""

    bytes_per_s: float
    flops_per_s: float

    @staticmethod
    def of(device: torch.device) -> Roof:
        return Roof(read_bandwidth(device), matmul_rate(device))

    def describe(self) -> dict[str, float]:
        return {"read_gbps": self.bytes_per_s / 1e9, "matmul_tflops": self.flops_per_s / 1e12}


class Result(NamedTuple):
    """A case as timed. `of_read` and `of_matmul` are shares of the two roofs; `others` microseconds of alternatives."""

    op: str
    shape: str
    case: str
    rows: int
    layers: int
    bytes: int
    flops: int
    us: float
    low_us: float
    high_us: float
    of_read: float | None = None
    of_matmul: float | None = None
    extra_mib: float | None = None
    others: Mapping[str, float | None] = NONE
    facts: Mapping[str, float | int | str] = NONE

    @property
    def of_roof(self) -> float | None:
        """The share of the roof that binds."""
        return None if self.of_read is None or self.of_matmul is None else max(self.of_read, self.of_matmul)


def measure(case: Case, device: torch.device, roof: Roof) -> Result:
    """Time a case beside its alternatives; one that does not run on this device has no time."""
    built = case.build(device)
    others: dict[str, float | None] = {}
    calls = {"own": built.own}
    for name, call in built.others.items():
        try:
            call(0)
            calls[name] = call
        except FAILURES:
            others[name] = None
    extra = extra_bytes(built.own)
    took = interleaved(calls, built.copies, length(built))
    others |= {name: took[name].us for name in calls if name != "own"}
    return result(case, built, took["own"], roof)._replace(others=others, extra_mib=extra / 2**20)


def result(case: Case, built: Built, took: Took, roof: Roof) -> Result:
    cost, s = built.cost, took.us * 1e-6
    return Result(
        case.op, case.shape, case.name, case.rows, case.layers, cost.bytes, cost.flops, *took,
        of_read=cost.bytes / s / roof.bytes_per_s, of_matmul=cost.flops / s / roof.flops_per_s, facts=built.facts,
    )  # fmt: skip


def release() -> None:
    """Give memory of the last case back before the next one takes its own."""
    gc.collect()
    torch.cuda.empty_cache()


def smoke(op: Op) -> Iterator[Result]:
    """An op's small cases through its reference on the CPU: that they run, and how long; there is no roof."""
    for name, args in op.cases().items():
        cost: Cost = op.cost(*args)
        rows = next(x.shape[0] for x in args if isinstance(x, Tensor))
        us = []
        for _ in range(5):
            began = time.perf_counter()
            op(*(x.clone() if isinstance(x, Tensor) else x for x in args))
            us.append((time.perf_counter() - began) * 1e6)
        yield Result(op.name, "small", name, rows, 1, cost.bytes, cost.flops, statistics.median(us), min(us), max(us))


def means(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Traffic-weighted shares of read bandwidth of a shape's matmuls, by rows: all bytes ÷ all time ÷ bandwidth.

    matmuls   those of a layer, each once
    and_head  those and the head, each once; None without one
    step      as a step runs them: each in its layers, and the head; None without one
    times     how many times as long an alternative takes over all of them, each in its layers
    """
    found = []
    linear = [r for r in results if r.op.startswith("linear") and r.of_read is not None]
    for op, shape, rows in dict.fromkeys((r.op, r.shape, r.rows) for r in linear):
        every = [r for r in linear if (r.op, r.shape, r.rows) == (op, shape, rows)]
        layer = [r for r in every if r.case != "head"]
        headed = 0 < len(layer) < len(every)
        names = set.intersection(*(set(r.others) for r in every))
        found.append(
            {
                "op": op,
                "shape": shape,
                "rows": rows,
                "matmuls": share(layer) if layer else None,
                "and_head": share(every) if headed else None,
                "step": share(every, layers=True) if headed else None,
                "times": {name: against(every, name) for name in sorted(names)},
            }
        )
    return found


def share(results: Sequence[Result], layers: bool = False) -> float:
    """All bytes ÷ all time ÷ read bandwidth, each result once or once a layer."""
    spent = [(r.layers if layers else 1) * r.us for r in results]
    return sum(us * (r.of_read or 0.0) for us, r in zip(spent, results, strict=True)) / sum(spent)


def against(results: Sequence[Result], other: str) -> float | None:
    """How many times as long the alternative takes over a step."""
    theirs = [r.others.get(other) for r in results]
    if any(us is None for us in theirs):
        return None
    return sum(r.layers * (us or 0.0) for r, us in zip(results, theirs, strict=True)) / sum(
        r.layers * r.us for r in results
    )


def cells(r: Result) -> tuple[str, ...]:
    """A row of the table, under HEAD."""
    s = r.us * 1e-6
    others = ", ".join(f"{name} " + ("-" if us is None else f"{us / r.us:.2f} ×") for name, us in r.others.items())
    facts = ", ".join(f"{name} {value}" for name, value in r.facts.items())
    return (
        r.op, r.shape, r.case, str(r.rows), f"{r.us:.2f}", f"{r.bytes / s / 1e9:.0f}", f"{r.flops / s / 1e12:.1f}",
        "-" if r.of_roof is None else f"{100 * r.of_roof:.1f} %", "; ".join(filter(None, (others, facts))),
    )  # fmt: skip


def line(values: Sequence[str], widths: Sequence[int] = (10, 12, 22, 5, 9, 6, 8, 8, 0)) -> str:
    """Cells under each other: names to the left, numbers to the right."""
    return "  ".join(
        v.ljust(w) if i < 3 or not w else v.rjust(w) for i, (v, w) in enumerate(zip(values, widths, strict=True))
    ).rstrip()


def described(r: Result) -> dict[str, Any]:
    """A result as a record keeps it."""
    return {**r._asdict(), "of_roof": r.of_roof, "others": dict(r.others), "facts": dict(r.facts)}
