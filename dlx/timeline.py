"""The table of a trace: where the time of a step goes, by verb and by kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from dlx.caches import kernels
from dlx.observe import DOMAIN

HOST = ("plan", "launch", "prefill", "step", "harvest", "take")
DEVICE = ("prefill", "launch", "step", "open", "look", "think", "decide", "commit", "harvest")
ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}
CALLS = {"cuda_runtime", "cuda_driver"}  # events that send work to a GPU
MATMULS = ("gemm", "gemv", "nvjet", "cutlass", "cublas", "splitKreduce")  # parts of names of libraries' kernels
NAME_CHARS, MOST_LINES = 72, 32  # of a printed table

Event = dict[str, Any]  # of a chrome trace: its fields are what torch's profiler writes


class Line(NamedTuple):
    """One line of a table, a step: how often, how long, and its share of the device's busy time (0 for the host's).

    own_us  without the time in which work that began before still ran: a dependent launch begins early, and waits
    """

    name: str
    op: str
    n: float
    us: float
    own_us: float
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
    homes = {kernel.__name__: kernel.__module__.split(".")[2] for kernel in kernels()}
    hosts, verbs, costs = Sums(steps), Sums(steps), Sums(steps)
    for event in events:
        if (verb := verb_of(event)) in HOST:
            hosts.add(verb, "", event["dur"], event["dur"])
    reached = busy = 0.0
    for event, verb, op in sorted(work, key=lambda one: (one[0]["ts"], one[0]["ts"] + one[0]["dur"])):
        end = event["ts"] + event["dur"]
        alone = max(0.0, end - max(event["ts"], reached))
        reached, busy = max(reached, end), busy + alone
        verbs.add(verb, "", event["dur"], alone)
        costs.add(event["name"], op_of(event["name"], op, homes), event["dur"], alone)
    return Table(steps, hosts.lines(HOST), verbs.lines(DEVICE, busy), costs.lines((), busy))


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


def op_of(kernel: str, sender: str, homes: dict[str, str]) -> str:
    """What a kernel is for: an op of dlx, a matmul of a library, what Inductor fused, a copy, an operator of torch."""
    if kernel in homes:
        return homes[kernel]
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
        self.of: dict[tuple[str, str], tuple[int, float, float]] = {}

    def add(self, name: str, op: str, us: float, own_us: float) -> None:
        n, sum_us, sum_own_us = self.of.get((name, op), (0, 0.0, 0.0))
        self.of[name, op] = n + 1, sum_us + us, sum_own_us + own_us

    def lines(self, order: tuple[str, ...], busy_us: float = 0.0) -> list[Line]:
        """In the order of the names, those not in it behind, the costliest first."""
        found = [
            Line(name, op, n / self.steps, us / self.steps, own_us / self.steps, own_us / busy_us if busy_us else 0.0)
            for (name, op), (n, us, own_us) in self.of.items()
        ]
        return sorted(found, key=lambda x: (order.index(x.name) if x.name in order else len(order), -x.own_us))


def lines(title: str, rows: list[Line]) -> str:
    """A table as text."""
    ops = any(row.op for row in rows)
    shares = any(row.share for row in rows)
    cells = [[title, *(["op"] if ops else []), "n", "µs", *(["own µs", "%"] if shares else [])]]
    if len(rows) > MOST_LINES:
        rest = rows[MOST_LINES - 1 :]
        n, us, own_us, share = (sum(column) for column in list(zip(*rest, strict=True))[2:])
        rows = [*rows[: MOST_LINES - 1], Line(f"{len(rest)} more", "", n, us, own_us, share)]
    for row in rows:
        name = row.name if len(row.name) <= NAME_CHARS else row.name[: NAME_CHARS - 1] + "…"
        of_device = [f"{row.own_us:.1f}", f"{100 * row.share:.1f}"] if shares else []
        cells.append([name, *([row.op] if ops else []), f"{row.n:.4g}", f"{row.us:.1f}", *of_device])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = 2 if ops else 1
    return "\n".join(
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    )
