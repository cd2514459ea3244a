"""The tasks of the bundled model: prompts drawn from a seed, and checkers of the answers.

The same seed gives the same stream of samples on every machine. A prompt whose CRC-32 is a multiple of 50 is
held out: training never sees it, evaluation sees nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from random import Random
from zlib import crc32

from dlx.errors import ConfigError
from dlx.tasks.arithmetic import arithmetic, three_numbers, two_numbers, units
from dlx.tasks.chat import chat
from dlx.tasks.code import function, same_results
from dlx.tasks.facts import facts
from dlx.tasks.lists import ordered, reversed_list
from dlx.tasks.problems import problem
from dlx.tasks.records import records, same_record
from dlx.tasks.story import follows_grammar, story
from dlx.tasks.symbolic import symbolic
from dlx.tasks.task import Draft, Sample, Task, same_number, same_text

__all__ = ["MIX", "TASKS", "Draft", "Sample", "Task", "check", "held", "installed", "sample"]

log = logging.getLogger(__name__)

HELD_OUT = 50  # one prompt in so many

TASKS = {
    "gsm": Task("gsm", problem, same_number),
    "rgsm": Task("rgsm", symbolic, same_number, needs="reasoning_gym"),
    "arith": Task("arith", arithmetic, same_number),
    "sort": Task("sort", ordered, same_text),
    "reverse": Task("reverse", reversed_list, same_text),
    "json": Task("json", records, same_record),
    "units": Task("units", units, same_number),
    "code": Task("code", function, same_results),
    "story": Task("story", story, follows_grammar),
    "facts": Task("facts", facts, same_text, closed=True),
    "chat": Task("chat", chat, same_text, closed=True),
    "chain3": Task("chain3", three_numbers, same_text),
    "add2": Task("add2", two_numbers, same_text),
}

# Shares of the bundled model's training data; its keys are the eleven tasks of its evaluation, in order.
MIX = {
    "gsm": 0.22,
    "rgsm": 0.16,
    "arith": 0.10,
    "sort": 0.07,
    "reverse": 0.07,
    "json": 0.08,
    "units": 0.05,
    "code": 0.08,
    "story": 0.12,
    "facts": 0.04,
    "chat": 0.01,
}


def sample(rng: Random, mix: Mapping[str, float], want_held: bool = False) -> Sample:
    """One sample of a task drawn by the weights of `mix`: a held-out one, or one that training may see.

    A closed task has no held-out part and gives the same samples to both.

    Raises ConfigError  if a task is unknown, or its package is not installed
    """
    names, weights = list(mix), list(mix.values())
    while True:
        task = _task(rng.choices(names, weights)[0])
        drawn = Sample(task.name, *task.generate(rng))
        if task.closed or held(task.name, drawn.prompt) == want_held:
            return drawn


def held(name: str, prompt: str) -> bool:
    """Whether `prompt` of task `name` is held out from training."""
    return not _task(name).closed and crc32(prompt.encode()) % HELD_OUT == 0


def check(sample: Sample, text: str) -> bool:
    """Whether `text`, surrounding white space removed, answers the sample's prompt."""
    return _task(sample.task).check(sample, text.strip())


def installed(mix: Mapping[str, float]) -> dict[str, float]:
    """`mix` without the tasks whose package is not installed; a warning names each one left out."""
    kept = {}
    for name, weight in mix.items():
        package = _task(name).needs
        if package and find_spec(package) is None:
            log.warning("task %r is left out: it needs the package %s, which is not installed", name, package)
        else:
            kept[name] = weight
    return kept


def _task(name: str) -> Task:
    if name not in TASKS:
        raise ConfigError(f"task {name!r} is unknown; choose from {', '.join(TASKS)}")
    return TASKS[name]
