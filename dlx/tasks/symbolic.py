"""Word problems from the GSM-Symbolic templates of the PyPI package reasoning-gym (Apache-2.0)."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

from dlx.errors import ConfigError
from dlx.tasks.problems import problem
from dlx.tasks.task import Draft

TRIES = 20  # templates drawn before a problem of our own takes the place
LONGEST_PROMPT, LONGEST_ANSWER = 480, 520  # characters, exclusive


def symbolic(rng: Random) -> Draft:
    """A template filled in, if it is short, ASCII, and its working ends in its answer.

    Raises ConfigError  if reasoning-gym is not installed
    """
    templates = _templates()
    for _ in range(TRIES):
        try:
            filled = rng.choice(templates)(rng, 1.0)
        except ValueError:  # the template found no numbers that fit
            continue
        prompt = filled["question"]
        answer = re.sub(r"(\d)\.0\b", r"\1", filled["metadata"]["answer_cot"].strip())
        number = answer.split("####")[-1].strip()
        short = len(answer) < LONGEST_ANSWER and len(prompt) < LONGEST_PROMPT
        if short and answer.isascii() and number == filled["answer"]:
            return Draft(prompt, answer, number)
    return problem(rng)


@cache
def _templates() -> tuple[Callable[[Random, float], dict[str, Any]], ...]:
    """The package's hundred generators in order; Any is how the package types what they return."""
    try:
        from reasoning_gym.arithmetic.gsm_symbolic import generators_00_49, generators_50_99
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"task 'rgsm' needs the package reasoning-gym, and module {error.name!r} is not installed; "
            "run `pip install reasoning-gym`, or leave 'rgsm' out of the tasks"
        ) from error
    return tuple(getattr(generators_00_49 if i < 50 else generators_50_99, f"generate_{i}") for i in range(100))
