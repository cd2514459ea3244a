"""Capitals, continents and currencies, from assets/tiny/facts.json (npm countries-list, MIT)."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from random import Random
from typing import NamedTuple

from dlx.tasks.task import Draft


def facts(rng: Random) -> Draft:
    """One question about one country; meta is the word asked for."""
    country = rng.choice(_countries())
    name, capital, continent, currency = country
    kind = rng.randrange(4)
    if kind == 0:
        prompt = rng.choice([f"What is the capital of {name}?", f"Which city is the capital of {name}?"])
        return Draft(prompt, f"The capital of {name} is {capital}.", capital)
    if kind == 1:
        prompt = f"Which country has the capital {capital}?"
        return Draft(prompt, f"{capital} is the capital of {name}.", name)
    if kind == 2:
        return Draft(f"On which continent is {name}?", f"{name} is in {continent}.", continent)
    prompt = f"What is the currency code of {name}?"
    return Draft(prompt, f"The currency code of {name} is {currency}.", currency)


class Country(NamedTuple):
    name: str
    capital: str
    continent: str
    currency: str


@cache
def _countries() -> list[Country]:
    text = files("dlx").joinpath("assets", "tiny", "facts.json").read_text(encoding="utf-8")
    return [Country(**row) for row in json.loads(text)]
