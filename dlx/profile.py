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
from typing import TYPE_CHECKING, Any, Literal

import torch

from dlx.errors import ConfigError, RequestError
from dlx.provenance import provenance
from dlx.timeline import Table, tabled

if TYPE_CHECKING:
    from dlx.engine import Engine


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

    def stop(self) -> None:
        """End the recording, if one is under way."""
        if not self.done and self.turns > self.settings.start:
            self.done = True
            self._wait()
            self._tool.stop_trace() if self._tool else torch.cuda.profiler.stop()

    def end(self, steps: int) -> None:
        """Stop, and write what was recorded of so many steps."""
        self.stop()
        if self._tool is None:
            return
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
        seen.stop()
