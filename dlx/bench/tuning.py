"""Launch configurations searched in the very step: the captured forward judges them, not a chain of one op's calls.

What an op finds when its turn comes, and what the next one finds, differ between the two: which processors are free,
what lies in L2, whether memory is idle. The forward is captured as it runs without Inductor: its ops are the same, and
nothing has to be traced once more for each configuration.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlx.bench.arguments import asked as named
from dlx.bench.calls import calls
from dlx.bench.clock import there
from dlx.bench.forward import longest
from dlx.bench.scene import How, Scene, Stand, stand
from dlx.errors import ConfigError
from dlx.ops.bench.__main__ import SUITES
from dlx.ops.bench.chain import captured, turns
from dlx.ops.bench.report import FAILURES, release
from dlx.ops.bench.search import FAR, Ask, answering, apart, asked, search, tensors
from dlx.ops.bench.tune import line, note, write
from dlx.ops.tuned import found as recorded

FORWARDS = 4  # of a captured graph
ROUNDS, LAST = 3, 9  # replays of a search, and of the last comparison
GAIN = 0.998  # of a forward's time: what is less is noise; an op is a part of it
Key = tuple[str, tuple[int, ...]]
Again = Callable[[], object]


def scenes(names: Sequence[str], block: int, context: int, requests: int, rows: Sequence[int]) -> list[Scene]:
    """Those of these shapes. Raises ConfigError  for rows too: a step has its own"""
    if rows:
        raise ConfigError(f"--rows {rows[0]} does not suit --block {block}, whose step has its own; leave one out")
    return [named(name, block, 1, context, requests, accept=4) for name in names]


def tune(
    scenes: Sequence[Scene], suites: Sequence[str], budget_s: float, folder: Path, trials: Path | None, command: str,
    as_json: bool = False,
) -> None:  # fmt: skip
    """Search the configurations that a forward of each scene asks for; the winner is recorded after each.

    suites    of `dlx.ops.bench`, whose ops are searched
    budget_s  seconds in all, shared evenly
    trials    file of lines to which every configuration is appended with its time
    as_json   stdout gets a JSON object an ask
    Raises ConfigError without a GPU
    """
    if not torch.cuda.is_available():
        raise ConfigError("torch finds no CUDA device; launch configurations are tuned on a GPU")
    end = time.monotonic() + budget_s
    ops = {op for suite in suites for op in SUITES[suite].ops}
    done: set[Key] = set()
    found: dict[str, list[dict[str, Any]]] = {}
    for n, scene in enumerate(scenes):
        now = time.monotonic()
        title = f"a step of {scene.describe()['shape']}, blocks of {scene.block}, {scene.requests} at {scene.context}"
        for ask, config, ms, times in searched(scene, ops, done, now + (end - now) / (len(scenes) - n)):
            entry = {"key": list(ask.key), "config": config._asdict(), **ms, "case": title}
            print(line(f"{title}: {ask.op}", len(times), entry, as_json), flush=True)
            found.setdefault(ask.op, []).append(entry)
            write(folder, ask.op, found[ask.op], command)
            if trials:
                note(trials, f"{title}: {ask.op} {ask.key}", times)
        release()


@torch.no_grad()
def searched(
    scene: Scene, ops: Collection[str], done: set[Key], deadline: float
) -> Iterator[tuple[Ask, Any, dict[str, float], dict[Any, float]]]:
    """What a forward asks for and is not done yet: the ask, the winner, milliseconds a forward, of each tried."""
    how = How(graphs="off")
    worker = scene.worker(how, longest(scene, how, 2 * FORWARDS * (LAST + 2), 0))
    chosen: dict[Key, Any] = {}
    with there(worker.device):
        at = stand(worker, scene)
        wanted = {key: each for key, each in asks(at, ops).items() if key not in done}
        for i, (key, (ask, again, commits)) in enumerate(wanted.items()):
            worker.graphs.commits = commits
            now, known = time.monotonic(), recorded(*ask)
            took = partial(timed_under, at, chosen, key, again, results(again, chosen))
            config, times = search(ask, took, now + (deadline - now) / (len(wanted) - i), known, GAIN)
            own, best = between(at, chosen | {key: ask.default}, chosen | {key: config})
            if best >= GAIN * own:
                config, best = ask.default, own
            chosen[key] = config
            done.add(key)
            yield ask, config, {"step_ms": round(best, 4), "default_step_ms": round(own, 4), "commits": commits}, times


def asks(at: Stand, ops: Collection[str]) -> dict[Key, tuple[Ask, Again, bool]]:
    """What the calls of these ops ask for in one forward, then in one in which blocks commit where that is another: a
    call that asks for it, and whether it is of the latter."""
    out: dict[Key, tuple[Ask, Again, bool]] = {}
    for commits in (False, True):
        for call in calls(at, commits):
            for ask in asked(lambda _, again=call.again: again()) if call.op in ops else ():
                out.setdefault((ask.op, ask.key), (ask, call.again, commits))
    return out


def answer(chosen: Mapping[Key, Any]) -> Callable[[Ask], Any]:
    """What is chosen, else what is recorded."""
    return lambda ask: chosen.get((ask.op, ask.key)) or recorded(*ask)


def results(again: Again, chosen: Mapping[Key, Any]) -> list[Tensor]:
    """What a call returns."""
    with answering(answer(chosen)):
        return tensors(again())


def timed_under(at: Stand, chosen: Mapping[Key, Any], key: Key, again: Again, want: list[Tensor], config: Any) -> float:
    """Microseconds a forward under a configuration; infinite if it fails or gives other numbers."""
    under = {**chosen, key: config}
    try:
        if not apart(results(again, under), want) <= FAR:
            return float("inf")
        graph = step(at, under)
    except FAILURES:
        return float("inf")
    at.rewind()
    return turns({"step": graph}, FORWARDS, ROUNDS)["step"].us


def between(at: Stand, *under: Mapping[Key, Any]) -> list[float]:
    """Milliseconds a forward under each, in turns."""
    graphs = {str(i): step(at, chosen) for i, chosen in enumerate(under)}
    at.rewind()
    return [took.us / 1e3 for took in turns(graphs, FORWARDS, LAST).values()]


def step(at: Stand, chosen: Mapping[Key, Any]) -> torch.cuda.CUDAGraph:
    """A few forwards, captured; where those that commit are searched, each has a block that does."""

    def forward(_: int) -> None:
        if at.worker.graphs.commits:
            at.committing()
        at.turn()

    at.rewind()
    with answering(answer(chosen)):
        return captured(forward, 1, FORWARDS)
