"""The search for launch configurations of the ops on this GPU.

An op asks `dlx.ops.tuned` for its configuration. Here we answer instead: with one configuration after the other, while
the cases of `dlx.ops.bench` are timed. A field at a time is changed, and kept where it is faster; a configuration that
does not compile, does not fit or gives other numbers is left out. The best and the code's own are timed once more in
turns, and the winner is recorded in profiles/kernels/<gpu>/<op>.json, also where it is the code's own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from dlx.ops import tuned as records
from dlx.ops.bench.case import Case
from dlx.ops.bench.chain import Built, Call, Took, captured, length, turns
from dlx.ops.bench.report import FAILURES

ROUNDS = 5  # of a search; the last comparison takes as many as a bench
GAIN = 0.995  # of the time of the best so far: what is less is noise
FAR = 0.02  # relative distance of results at which a configuration is wrong
# what a field may be; one that is not named here is halved, doubled, or turned
VALUES: dict[str, tuple[int, ...]] = {
    "warps": (1, 2, 4, 8, 16),
    "stages": (1, 2, 3, 4, 5, 6, 7, 8),
    "splits": (1, 2, 3, 4, 6, 8, 12, 16, 24, 32),
    "programs": (1, 2, 3, 4, 5, 6, 8),
}


class Ask(NamedTuple):
    """What an op asked for while a case ran."""

    op: str
    key: tuple[int, ...]
    default: Any
    fits: Callable[[Any], bool]


class Best(NamedTuple):
    """The outcome of a search, in microseconds beside the code's own configuration."""

    config: Any
    us: float
    default_us: float
    times: dict[Any, float]  # of every configuration that was tried


@contextmanager
def answering(answer: Callable[[Ask], Any]) -> Iterator[None]:
    """Whatever an op asks `tuned` for is answered here; what it had remembered is forgotten before and after."""
    with mock.patch.object(records, "found", lambda *ask: answer(Ask(*ask))):
        forget()
        yield
    forget()


def forget() -> None:
    """Empty the caches of the functions that choose configurations."""
    for name, module in list(sys.modules.items()):
        if name.startswith("dlx.ops"):
            for key, value in vars(module).items():
                if key.startswith("choose") and hasattr(value, "cache_clear"):
                    value.cache_clear()


def asked(call: Call) -> list[Ask]:
    """What one call asks for, each key once."""
    asks: dict[tuple[str, tuple[int, ...]], Ask] = {}

    def note(ask: Ask) -> Any:
        asks.setdefault((ask.op, ask.key), ask)
        return ask.default

    with answering(note):
        call(0)
    return list(asks.values())


def with_config(answers: dict[tuple[str, tuple[int, ...]], Any]) -> Callable[[Ask], Any]:
    """Answers by (op, key); the code's own where there is none."""
    return lambda ask: answers.get((ask.op, ask.key), ask.default)


def neighbours(config: Any, field: str) -> list[Any]:
    """The configurations that differ in one field, near ones first; of `programs` also with the memory shared anew."""
    value = getattr(config, field)
    if isinstance(value, bool):
        return [config._replace(**{field: not value})]
    values = VALUES.get(field) or [n for n in (value // 2, value * 2) if n >= 1]
    some = [config._replace(**{field: n}) for n in sorted(values, key=lambda n: abs(n - value)) if n != value]
    if field == "programs":  # of a processor: fewer may each have a longer pipeline
        some += [c._replace(stages=n) for c in some if 1 <= (n := config.stages * value // c.programs - 1) <= 8]
    return some


def shortened(ask: Ask, config: Any) -> Any:
    """The configuration with as long a pipeline as fits, where its own does not: larger tiles leave room for less."""
    if "stages" not in config._fields:
        return config
    fewer = (config._replace(stages=n) for n in range(config.stages, 0, -1))
    return next(filter(ask.fits, fewer), config)


def search(
    ask: Ask, took: Callable[[Any], float], deadline: float, known: Any = None, gain: float = GAIN
) -> tuple[Any, dict[Any, float]]:
    """(the fastest configuration found, the time of each tried): fields in turn, until none helps or time is over.

    known  where to begin, if it is faster than the code's own: what is recorded, so that a short search loses nothing
    gain   of the time of the best so far: what is less is noise
    """
    times: dict[Any, float] = {config: took(config) for config in dict.fromkeys((ask.default, known or ask.default))}
    best = min(times, key=lambda config: times[config])
    while True:
        before = best
        for field in best._fields:
            for config in map(partial(shortened, ask), neighbours(best, field)):
                if config in times or not ask.fits(config):
                    continue
                if time.monotonic() > deadline:
                    return best, times
                times[config] = took(config)
                if times[config] < gain * times[best]:
                    best = config
        if best == before:
            return best, times


def apart(got: object, want: object) -> float:
    """How far results are from each other, relative to their size; of integers the share that differs."""
    pairs = zip(tensors(got), tensors(want), strict=True)
    return max((_apart(g, w) for g, w in pairs), default=0.0)


def _apart(got: Tensor, want: Tensor) -> float:
    if not want.is_floating_point():
        return float((got != want).float().mean())
    return float((got.float() - want.float()).norm() / want.float().norm().clamp_min(1e-30))


def tensors(result: object) -> list[Tensor]:
    """Copies of what a call returned."""
    some = result if isinstance(result, tuple | list) else (result,)
    return [x.clone() for x in some if isinstance(x, Tensor)]


def timed_under(built: Built, ask: Ask, others: dict[Any, Any], want: list[Tensor], config: Any) -> float:
    """Microseconds a call under a configuration; infinite if it fails or gives other numbers."""
    try:
        with answering(with_config(others | {(ask.op, ask.key): config})):
            if not apart(tensors(built.own(0)), want) <= FAR:
                return float("inf")
            n = length(built)
            graph = captured(built.own, built.copies, n)
    except FAILURES:
        return float("inf")
    return turns({"own": graph}, n, ROUNDS)["own"].us


def tune(case: Case, device: torch.device, done: set[Any], deadline: float) -> Iterator[tuple[Ask, Built, Best]]:
    """Search for each configuration that a case asks for and that is not done yet."""
    built = case.build(device)
    answers: dict[Any, Any] = {}
    for ask in asked(built.own):
        if (ask.op, ask.key) in done:
            continue
        with answering(with_config(answers)):
            want = tensors(built.own(0))
        config, times = search(ask, partial(timed_under, built, ask, answers, want), deadline, records.tuned(*ask))
        final = compare(built, ask, answers, config)
        if final["best"].us >= GAIN * final["default"].us:
            config, final = ask.default, final | {"best": final["default"]}
        answers[ask.op, ask.key] = config
        yield ask, built, Best(config, final["best"].us, final["default"].us, times)


def compare(built: Built, ask: Ask, answers: dict[Any, Any], config: Any) -> dict[str, Took]:
    """The code's configuration and the best one, in turns."""
    n = length(built)
    graphs = {}
    for name, some in (("default", ask.default), ("best", config)):
        with answering(with_config(answers | {(ask.op, ask.key): some})):
            graphs[name] = captured(built.own, built.copies, n)
    return turns(graphs, n)
