"""Stories from a small grammar: nine sentences, each one of a few forms."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from random import Random
from typing import NamedTuple

from dlx.tasks.task import Draft, Sample
from dlx.tasks.words import ANIMALS, FEELINGS, NAMES, PLACES, THINGS, TRAITS, WEATHERS, WOMEN


class Cast(NamedTuple):
    """What a story's sentences are filled with."""

    name: str
    animal: str
    place: str
    thing: str
    trait: str
    feeling: str
    weather: str
    friend: str
    friend_animal: str


def story(rng: Random) -> Draft:
    """A story about an animal that lost a thing; meta is what the prompt fixes: an, th, n (or None)."""
    name = rng.choice(NAMES)
    friend = rng.choice([other for other in NAMES if other != name])
    animal, place, thing, trait, feeling, weather = map(
        rng.choice, (ANIMALS, PLACES, THINGS, TRAITS, FEELINGS, WEATHERS)
    )
    friend_animal = rng.choice([other for other in ANIMALS if other != animal])
    prompt = rng.choice(
        [
            f"Write a short story about {_a(animal)} and a {thing}.",
            f"Tell me a story about {name} the {animal} who lost a {thing}.",
            f"Tell a story about {_a(animal)} named {name} and a {thing}.",
        ]
    )
    cast = Cast(name, animal, place, thing, trait, feeling, weather, friend, friend_animal)
    text = " ".join(rng.choice(forms) for forms in _sentences(cast))
    return Draft(prompt, text, {"an": animal, "th": thing, "n": name if name in prompt else None})


def follows_grammar(sample: Sample, text: str) -> bool:
    """Whether the grammar, with what the prompt fixes, can produce exactly `text`."""
    return any(_matches(cast, text) for cast in _casts(sample, text))


def _casts(sample: Sample, text: str) -> Iterator[Cast]:
    """The casts that `text` may have: the first names in it, and every word of each kind in it."""
    animal, thing = sample.meta["an"], sample.meta["th"]
    names = [word for word in re.findall(r"[A-Z][a-z]+", text) if word in NAMES]
    name = sample.meta["n"] or next(iter(names), None)
    friend = next((other for other in names if other != name), None)
    if name is None or friend is None:
        return
    friend_animals = _found([other for other in ANIMALS if other != animal], text)
    kinds = (_found(words, text) for words in (PLACES, TRAITS, FEELINGS, WEATHERS))
    for place, trait, feeling, weather, friend_animal in itertools.product(*kinds, friend_animals):
        yield Cast(name, animal, place, thing, trait, feeling, weather, friend, friend_animal)


def _found(words: Sequence[str], text: str) -> Sequence[str]:
    """The words that occur in `text`; the first of them if none does."""
    return [word for word in words if re.search(rf"\b{word}\b", text)] or words[:1]


def _matches(cast: Cast, text: str) -> bool:
    for forms in _sentences(cast):
        form = next((form for form in forms if text.startswith(form)), None)
        if form is None:
            return False
        text = text[len(form) :].lstrip(" ")
    return not text


def _a(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _sentences(cast: Cast) -> list[list[str]]:
    """The forms that each of the nine sentences may take."""
    name, animal, place, thing, trait, feeling, weather, friend, friend_animal = cast
    she, her = ("she", "her") if name in WOMEN else ("he", "his")
    friend_she = "she" if friend in WOMEN else "he"
    subject, item = she.capitalize(), thing.split()[-1]
    return [
        [
            f"Once upon a time there was a {trait} {animal} named {name}.",
            f"{name} was a {trait} {animal} who lived near the {place}.",
            f"In a small {place} lived {_a(animal)} called {name}, who was very {trait}.",
        ],
        [
            f"{subject} loved {her} {thing} more than anything.",
            f"{name} had a {thing} that {she} carried everywhere.",
            f"Every day {she} played with {her} {thing}.",
        ],
        [
            f"One {weather} morning, the {item} was gone.",
            f"One {weather} day, {name} lost the {thing} in the {place}.",
            f"But on a {weather} afternoon the {item} disappeared.",
        ],
        [
            f"{name} looked under the leaves and behind the stones, but {she} could not find it.",
            f"{subject} searched the whole {place} and began to cry.",
            f"{name} felt sad, but {she} did not give up.",
        ],
        [
            f"Then {she} met {_a(friend_animal)} named {friend}.",
            f"Just then {_a(friend_animal)} called {friend} came by.",
        ],
        [
            f'"Do not worry," said {friend}. "I will help you."',
            f'"What is wrong?" asked {friend}. "I lost my {thing}," said {name}.',
            f'"Let us look together," said {friend}.',
        ],
        [
            f"{friend} was good at finding things, and soon {friend_she} saw the {item} in a tree.",
            f"They looked for a long time, and at last {friend_she} found the {item} by the water.",
            f"Together they followed the tracks and found the {item}.",
        ],
        [
            f"{name} was so {feeling} that {she} hugged {friend}.",
            f'"Thank you, {friend}!" said {name}. {subject} was very {feeling}.',
            f"{name} felt {feeling} and gave {friend} a big smile.",
        ],
        [
            f"From that day on, {name} and {friend} were best friends.",
            f"And {name} never lost the {item} again.",
            f"That night {name} slept well, and {friend} came to play the next day.",
        ],
    ]
