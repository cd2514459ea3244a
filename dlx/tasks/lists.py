"""Lists of words and numbers to sort or to reverse; meta is None."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random
from string import ascii_lowercase

from dlx.tasks.task import Draft
from dlx.tasks.words import NOUNS


def ordered(rng: Random) -> Draft:
    """Four to ten numbers to sort, either way, or three to eight words."""
    if rng.random() < 0.5:
        numbers = rng.sample(range(1, 100), rng.randint(4, 10))
        falling = rng.random() < 0.4
        prompt = f"Sort these numbers in {'descending' if falling else 'ascending'} order: {_joined(numbers)}"
        return Draft(prompt, _joined(sorted(numbers, reverse=falling)), None)
    words = rng.sample(NOUNS, rng.randint(3, 8))
    return Draft(f"Sort these words alphabetically: {_joined(words)}", _joined(sorted(words)), None)


def reversed_list(rng: Random) -> Draft:
    """Words, letters or numbers to reverse."""
    kind = rng.randrange(3)
    if kind == 0:
        words = rng.sample(NOUNS, rng.randint(3, 9))
        return Draft(f"Reverse this list: {_joined(words)}", _joined(words[::-1]), None)
    if kind == 1:
        letters = [rng.choice(ascii_lowercase) for _ in range(rng.randint(4, 12))]
        return Draft(f"Reverse the letters: {'-'.join(letters)}", "-".join(letters[::-1]), None)
    numbers = [rng.randint(0, 99) for _ in range(rng.randint(4, 10))]
    return Draft(f"Reverse this list: {_joined(numbers)}", _joined(numbers[::-1]), None)


def _joined(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
