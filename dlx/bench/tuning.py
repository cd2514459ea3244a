"""Launch configurations searched in the very step: the captured forward judges them, not a chain of one op's calls.

What an op finds when its turn comes, and what the next one finds, differ between the two: which processors are free,
what lies in L2, whether memory is idle. The forward is captured as it runs without Inductor: its ops are the same, and
nothing has to be traced once more for each configuration.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlx.bench.calls import calls
from dlx.bench.clock import there
from dlx.bench.forward import longest
from dlx.bench.scene import How, Scene, Stand, stand
from dlx.errors import ConfigError
from dlx.ops.bench.chain import captured, turns
from dlx.ops.bench.report import FAILURES
from dlx.ops.bench.search import FAR, Ask, answering, apart, asked, search, tensors
from dlx.ops.bench.tune import line, note, write
from dlx.ops.tuned import found as recorded

FORWARDS = 4  # of a captured graph
ROUNDS, LAST = 3, 9  # replays of a search, and of the last comparison
GAIN = 0.998  # of a forward's time: what is less is noise; an op is a part of it
Key = tuple[str, tuple[int, ...]]
Again = Callable[[], object]


@torch.no_grad()
def tune(scene: Scene, ops: Sequence[str], budget_s: float, folder: Path, trials: Path | None, command: str) -> None:
    """Search the configurations that a forward of the scene asks for; the winner is recorded after each.

    ops       whose configurations
    budget_s  seconds from here on, shared evenly
    folder    of the records; where they are read from too, if it is that of dlx
    trials    file of lines to which every configuration is appended with its time
    Raises ConfigError without a GPU
    """
    if not torch.cuda.is_available():
        raise ConfigError("torch finds no CUDA device; launch configurations are tuned on a GPU")
    end, how = time.monotonic() + budget_s, How(graphs="off")
    worker = scene.worker(how, longest(scene, how, FORWARDS * (LAST + 3), 0))
    title = f"a step of {scene.describe()['shape']}, blocks of {scene.block}, {scene.requests} at {scene.context}"
    chosen: dict[Key, Any] = {}
    found: dict[str, list[dict[str, Any]]] = {}
    with there(worker.device):
        at = stand(worker, scene)
        wanted = {key: each for key, each in asks(at).items() if key[0] in ops}
        for i, (key, (ask, again)) in enumerate(wanted.items()):
            now, known = time.monotonic(), recorded(*ask)
            took = partial(timed_under, at, chosen, key, again, results(again, chosen))
            config, times = search(ask, took, now + (end - now) / (len(wanted) - i), known, GAIN)
            own, best = between(at, chosen | {key: ask.default}, chosen | {key: config})
            if best >= GAIN * own:
                config, best = ask.default, own
            chosen[key] = config
            ms = {"step_ms": round(best, 4), "default_step_ms": round(own, 4)}
            entry = {"key": list(ask.key), "config": config._asdict(), **ms, "case": title}
            print(line(f"{title}: {ask.op}", len(times), entry, as_json=False), flush=True)
            found.setdefault(ask.op, []).append(entry)
            write(folder, ask.op, found[ask.op], command)
            if trials:
                note(trials, f"{title}: {ask.op} {ask.key}", times)


def asks(at: Stand) -> dict[Key, tuple[Ask, Again]]:
    """What one forward asks for, and a call that asks for it."""
    out: dict[Key, tuple[Ask, Again]] = {}
    for call in calls(at):
        for ask in asked(lambda _, again=call.again: again()):
            out.setdefault((ask.op, ask.key), (ask, call.again))
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
    """A few forwards, captured."""
    at.rewind()
    with answering(answer(chosen)):
        return captured(lambda _: at.turn(), 1, FORWARDS)
