"""Sums, products and unit conversions, with their working; meta is the number asked for."""

from __future__ import annotations

from random import Random

from dlx.tasks.task import Draft

UNITS = [
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("kilometers", "meters", 1000),
    ("meters", "centimeters", 100),
    ("feet", "inches", 12),
    ("yards", "feet", 3),
    ("kilograms", "grams", 1000),
    ("pounds", "ounces", 16),
    ("gallons", "quarts", 4),
    ("dozens", "units", 12),
]


def arithmetic(rng: Random) -> Draft:
    """A sum, a difference, a product of two-digit numbers, or an expression of three operations."""
    kind = rng.randrange(4)
    if kind == 0:
        return _sum(rng)
    if kind == 1:
        return _product(rng)
    a, b, _, d = (rng.randint(2, 30) for _ in range(4))
    c = rng.randint(2, 9)
    if kind == 2:
        both, n = a + b, (a + b) * c - d
        steps = f"{a} + {b} = {both}\n{both} * {c} = {both * c}\n{both * c} - {d} = {n}"
        return Draft(f"Compute ({a} + {b}) * {c} - {d}.", f"{steps}\n#### {n}", n)
    left, right, n = a * c, b * 2, a * c + b * 2
    steps = f"{a} * {c} = {left}\n{b} * 2 = {right}\n{left} + {right} = {n}"
    return Draft(f"Compute {a} * {c} + {b} * 2.", f"{steps}\n#### {n}", n)


def _sum(rng: Random) -> Draft:
    a, b = rng.randint(1, 999), rng.randint(1, 999)
    sign = rng.choice("+-")
    if sign == "-" and a < b:
        a, b = b, a
    n = a + b if sign == "+" else a - b
    prompt = rng.choice([f"What is {a} {sign} {b}?", f"Compute {a} {sign} {b}."])
    return Draft(prompt, f"{a} {sign} {b} = {n}\n#### {n}", n)


def _product(rng: Random) -> Draft:
    a, b = rng.randint(11, 99), rng.randint(11, 99)
    tens, ones, n = b // 10 * 10, b % 10, a * b
    prompt = rng.choice([f"What is {a} * {b}?", f"Multiply {a} by {b}."])
    steps = f"{a} * {tens} = {a * tens}\n{a} * {ones} = {a * ones}\n{a * tens} + {a * ones} = {n}"
    return Draft(prompt, f"{steps}\n#### {n}", n)


def units(rng: Random) -> Draft:
    """A conversion between two units, either way, or of a mixed quantity."""
    large, small, factor = rng.choice(UNITS)
    n = rng.randint(2, 60)
    whole = n * factor
    if rng.random() < 0.3:
        rest = rng.randint(1, factor - 1)
        steps = f"{n} {large} = {n} * {factor} = {whole} {small}\n{whole} + {rest} = {whole + rest}"
        prompt = f"Convert {n} {large} and {rest} {small} to {small}."
        return Draft(prompt, f"{steps}\n#### {whole + rest}", whole + rest)
    if rng.random() < 0.4:
        return Draft(f"Convert {whole} {small} to {large}.", f"{whole} / {factor} = {n}\n#### {n}", n)
    prompt = f"How many {small} are in {n} {large}?"
    return Draft(prompt, f"{n} * {factor} = {whole}\n#### {whole}", whole)


def two_numbers(rng: Random) -> Draft:
    """The sum of two numbers of two digits; meta is None."""
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    return Draft(f"{a} + {b} =", f"{a + b}", None)


def three_numbers(rng: Random) -> Draft:
    """The sum of three numbers of two digits in two steps; meta is None."""
    a, b, c = (rng.randint(10, 99) for _ in range(3))
    return Draft(f"{a} + {b} + {c} =", f"{a} + {b} = {a + b}\n{a + b} + {c} = {a + b + c}", None)
