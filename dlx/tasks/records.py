"""People as sentences, JSON or CSV, to be turned into another of these forms."""

from __future__ import annotations

import json
from random import Random

from dlx.tasks.task import Draft, Sample
from dlx.tasks.words import CITIES, JOBS, LAST_NAMES, NAMES

SENTENCES = [
    "{name} is {age} years old, lives in {city} and works as a {job}.",
    "{name}, {age}, is a {job} from {city}.",
    "A {job} named {name} ({age}) moved to {city}.",
]


def records(rng: Random) -> Draft:
    """One to three people; meta is the parsed JSON, or the CSV text, that answers."""
    kind = rng.randrange(3)
    people = [_person(rng) for _ in range(rng.randint(1, 3))]
    if kind == 0:
        person = people[0]
        sentence = rng.choice(SENTENCES).format(**person)
        return Draft(f"Extract the facts as JSON. {sentence}", json.dumps(person), person)
    rows = [",".join(map(str, person.values())) for person in people]
    csv = "\n".join(["name,age,city,job", *rows])
    if kind == 1:
        return Draft(f"Convert this CSV to JSON.\n{csv}", json.dumps(people), people)
    return Draft(f"Convert this JSON to CSV.\n{json.dumps(people)}", csv, csv)


def same_record(sample: Sample, text: str) -> bool:
    """Whether `text` is the CSV, or JSON of the same value."""
    if isinstance(sample.meta, str):
        return text == sample.meta
    try:
        return json.loads(text) == sample.meta
    except (ValueError, RecursionError):
        return False


def _person(rng: Random) -> dict[str, str | int]:
    name = f"{rng.choice(NAMES)} {rng.choice(LAST_NAMES)}"
    return {"name": name, "age": rng.randint(18, 80), "city": rng.choice(CITIES), "job": rng.choice(JOBS)}
