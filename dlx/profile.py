"""Profiles: some steps of a running engine, as a trace and as a table by verb and by kernel.

    with profiled(llm.engine, Profile(start=4, steps=8, out=Path("traces"))) as seen:
        llm.generate(...)
    print(seen.table)

`<out>/trace.json` is for chrome://tracing and Perfetto, `<out>/table.json` holds the table. With tool="cuda" nothing is
written: nsys and ncu are told when to record. The parts of a step are told apart where it runs eagerly, graphs="off";
compiled or captured, all of its kernels stand under "step". A launch of several forwards shows them with unroll=True.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from dlx.caches import kernels
from dlx.errors import ConfigError, RequestError
from dlx.observe import DOMAIN
from dlx.provenance import provenance

if TYPE_CHECKING:
    from dlx.engine import Engine

HOST = ("plan", "launch", "prefill", "step", "harvest", "take")
DEVICE = ("prefill", "launch", "step", "open", "look", "think", "decide", "commit", "harvest")
ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}
CALLS = {"cuda_runtime", "cuda_driver"}  # events that send work to a GPU
MATMULS = ("gemm", "gemv", "nvjet", "cutlass", "cublas", "splitKreduce")  # parts of names of libraries' kernels
NAME_CHARS, MOST_LINES = 72, 32  # of a printed table

Event = dict[str, Any]  # of a chrome trace: its fields are what torch's profiler writes


@dataclass(frozen=True)
class Profile:
    """What to record.

    start  turns of the loop that run before: they compile, capture and warm up
    steps  turns that are recorded
    out    folder of the trace and the table
    tool   torch: a trace and a table; cuda: cudaProfilerStart and Stop around the steps, for nsys and ncu
    """

    start: int = 4
    steps: int = 8
    out: Path = Path("dlx-profile")
    tool: Literal["torch", "cuda"] = "torch"

    def check(self) -> None:
        """Raise ConfigError for a value that is not allowed."""
        for name in ("start", "steps"):
            n = getattr(self, name)
            if type(n) is not int or n < 1:
                raise ConfigError(f"{name}={n!r} turns are not allowed; use a whole number from 1 on")
        if self.tool == "cuda" and not torch.cuda.is_available():
            raise ConfigError("tool='cuda' needs a CUDA device; use tool='torch'")
        if self.tool not in ("torch", "cuda"):
            raise ConfigError(f"tool={self.tool!r} is unknown; use torch or cuda")


class Line(NamedTuple):
    """One line of a table, a step: how often, how long, and its share of the device's time (0 for the host's)."""

    name: str
    op: str
    n: float
    us: float
    share: float


class Table(NamedTuple):
    """Where the time of a step goes.

    host     verbs of the host, what is within them included
    verbs    work of the device by the verb that sent it; on a CPU the outermost operators
    kernels  the same work by kernel or operator, the costliest first
    """

    steps: int
    host: list[Line]
    verbs: list[Line]
    kernels: list[Line]

    def __str__(self) -> str:
        parts = [
            lines(f"host, a step of {self.steps}", self.host),
            lines("device, a step by verb", self.verbs),
            lines("device, a step by kernel", self.kernels),
        ]
        return "\n\n".join(parts)


class Recording:
    """What is being recorded; `done` and `table` (of tool="torch") once the steps are over."""

    def __init__(self, engine: Engine, settings: Profile, command: str) -> None:
        self.engine, self.settings, self.command = engine, settings, command
        self.turns = 0  # begun so far
        self.done = False
        self.table: Table | None = None
        on_gpu = engine.worker.device.type == "cuda"
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
        self._wait = torch.cuda.synchronize if on_gpu else lambda: None
        self._tool = torch.profiler.profile(activities=kinds) if settings.tool == "torch" else None

    def before_turn(self) -> None:
        """Begin or end as this turn's number says."""
        at = self.turns - self.settings.start
        self.turns += 1
        if at == -1 and self._tool:
            self._tool.prepare_trace()
        elif at == 0:
            self._wait()
            self._tool.start_trace() if self._tool else torch.cuda.profiler.start()
        elif at == self.settings.steps:
            self.end(at)

    def end(self, steps: int) -> None:
        """Stop, and write what was recorded of so many steps."""
        self._wait()
        self.done = True
        if self._tool is None:
            torch.cuda.profiler.stop()
            return
        self._tool.stop_trace()
        out = self.settings.out.expanduser()
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._tool.export_chrome_trace(str(out / "trace.json"))
            self.table = tabled(json.loads((out / "trace.json").read_bytes())["traceEvents"], steps)
            (out / "table.json").write_text(json.dumps(self.record(self.table), indent=1) + "\n")
        except OSError as error:
            raise ConfigError(f"out={str(out)!r} cannot be written ({error.strerror}); use another folder") from error

    def record(self, table: Table) -> dict[str, Any]:
        worker = self.engine.worker
        return {
            "schema": 1,
            "profile": asdict(self.settings) | {"out": str(self.settings.out)},
            "policy": worker.policy.describe(),
            "graphs": worker.config.graphs,
            "forwards": worker.config.forwards,
            "steps": table.steps,
            **{kind: [line._asdict() for line in getattr(table, kind)] for kind in ("host", "verbs", "kernels")},
            "made": provenance(self.command, worker.config.device),
        }


@contextmanager
def profiled(engine: Engine, settings: Profile, command: str = "") -> Iterator[Recording]:
    """Record some of the turns that the engine runs in this block.

    Raises ConfigError   a setting that is not allowed; `out` cannot be written
           RequestError  there were too few turns to record one
    """
    settings.check()
    seen = Recording(engine, settings, command)
    engine.before_turn, before = seen.before_turn, engine.before_turn
    try:
        yield seen
        if not seen.done:
            steps = seen.turns - settings.start
            if steps < 1:
                raise RequestError(
                    f"the engine ran {seen.turns} turns, and recording begins after {settings.start}; lower start, "
                    "or ask for more tokens"
                )
            seen.end(steps)
    finally:
        engine.before_turn = before


def tabled(events: list[Event], steps: int) -> Table:
    """The table of a chrome trace of `steps` turns."""
    events = [event for event in events if event.get("ph") == "X"]
    threads: dict[tuple[Any, Any], list[Event]] = {}
    for event in events:
        if event.get("cat") in CALLS | {"cpu_op"} or verb_of(event):
            threads.setdefault((event["pid"], event["tid"]), []).append(event)
    sent: dict[int, tuple[str, str]] = {}  # a call's correlation → the verb and the operator around it
    outermost: list[tuple[Event, str, str]] = []
    for thread in threads.values():
        for event, parents in nested(thread):
            verb = next((v for parent in reversed(parents) if (v := verb_of(parent))), "outside")
            op = next((parent["name"] for parent in parents if operator(parent)), "")
            if event.get("cat") in CALLS:
                sent[event.get("args", {}).get("correlation", -1)] = verb, op
            elif operator(event) and not op:
                outermost.append((event, verb, event["name"]))
    on_gpu = [event for event in events if event.get("cat") in ON_GPU]
    work = [(e, *sent.get(e.get("args", {}).get("correlation", -1), ("outside", ""))) for e in on_gpu] or outermost
    own = {kernel.__name__: kernel.__module__.split(".")[2] for kernel in kernels()}
    total = sum(event["dur"] for event, _, _ in work) or 1
    hosts, verbs, costs = Sums(steps), Sums(steps), Sums(steps)
    for event in events:
        if (verb := verb_of(event)) in HOST:
            hosts.add(verb, "", event["dur"])
    for event, verb, op in work:
        verbs.add(verb, "", event["dur"])
        costs.add(event["name"], op_of(event["name"], op, own), event["dur"])
    return Table(steps, hosts.lines(HOST), verbs.lines(DEVICE, total), costs.lines((), total))


def verb_of(event: Event) -> str:
    """The verb of a range of dlx; empty for other events."""
    name = event.get("name", "")
    of_dlx = event.get("cat") == "user_annotation" and name.startswith(f"{DOMAIN}:")
    return name.removeprefix(f"{DOMAIN}:") if of_dlx else ""


def operator(event: Event) -> bool:
    """An operator that did work, as aten::add; not a frame around a compiled graph."""
    return event.get("cat") == "cpu_op" and "::" in event["name"]


def nested(events: list[Event]) -> Iterator[tuple[Event, list[Event]]]:
    """Each event of a thread with those around it, the outermost first."""
    around: list[Event] = []
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        while around and around[-1]["ts"] + around[-1]["dur"] <= event["ts"]:
            around.pop()
        yield event, around
        around.append(event)


def op_of(kernel: str, sender: str, own: dict[str, str]) -> str:
    """What a kernel is for: an op of dlx, a matmul of a library, what Inductor fused, a copy, an operator of torch."""
    if kernel in own:
        return own[kernel]
    for name in (kernel, sender):
        if name.startswith("dlx::"):
            return name.removeprefix("dlx::")
    if kernel.startswith(("triton_", "cpp_fused")):
        return "fused"
    if kernel.startswith(("Memcpy", "Memset")):
        return "copy"
    if any(part in kernel for part in MATMULS):
        return "matmul"
    return next((name for name in (sender, kernel) if name.startswith("aten::")), "other")


class Sums:
    """Counts and microseconds by name, of so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.of: dict[tuple[str, str], tuple[int, float]] = {}

    def add(self, name: str, op: str, us: float) -> None:
        n, sum_us = self.of.get((name, op), (0, 0.0))
        self.of[name, op] = n + 1, sum_us + us

    def lines(self, order: tuple[str, ...], total_us: float = 0.0) -> list[Line]:
        """In the order of the names, those not in it behind, the costliest first."""
        found = [
            Line(name, op, n / self.steps, us / self.steps, us / total_us if total_us else 0.0)
            for (name, op), (n, us) in self.of.items()
        ]
        return sorted(found, key=lambda x: (order.index(x.name) if x.name in order else len(order), -x.us))


def lines(title: str, rows: list[Line]) -> str:
    """A table as text."""
    ops = any(row.op for row in rows)
    shares = any(row.share for row in rows)
    cells = [[title, *(["op"] if ops else []), "n", "µs", *(["%"] if shares else [])]]
    if len(rows) > MOST_LINES:
        rest = rows[MOST_LINES - 1 :]
        n, us, share = (sum(column) for column in list(zip(*rest, strict=True))[2:])
        rows = [*rows[: MOST_LINES - 1], Line(f"{len(rest)} more", "", n, us, share)]
    for row in rows:
        name = row.name if len(row.name) <= NAME_CHARS else row.name[: NAME_CHARS - 1] + "…"
        share = [f"{100 * row.share:.1f}"] if shares else []
        cells.append([name, *([row.op] if ops else []), f"{row.n:.4g}", f"{row.us:.1f}", *share])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = 2 if ops else 1
    return "\n".join(
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    )
