"""What a task is: a generator of (prompt, answer) pairs and a checker of answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple


def same_text(sample: Sample, text: str) -> bool:
    """Whether `text` is the reference answer."""
    return text == sample.answer


def same_number(sample: Sample, text: str) -> bool:
    """Whether what follows the last '####' of `text`, commas removed, is the sample's number."""
    return text.split("####")[-1].strip().replace(",", "") == str(sample.meta)


class Draft(NamedTuple):
    """What a generator draws; `meta` is Any because each checker needs something else."""

    prompt: str
    answer: str
    meta: Any


class Sample(NamedTuple):
    """One prompt with its reference answer and what its checker needs."""

    task: str
    prompt: str
    answer: str
    meta: Any


@dataclass(frozen=True, slots=True)
class Task:
    """A family of prompts with an automatic checker.

    generate  draws one prompt; the same state of the generator gives the same draft
    check     (sample, stripped text) → whether the text answers the prompt
    closed    the prompts are a small fixed set: recall, without a held-out part
    needs     package that `generate` imports, None where dlx has all it takes
    """

    name: str
    generate: Callable[[Random], Draft]
    check: Callable[[Sample, str], bool]
    closed: bool = False
    needs: str | None = None
