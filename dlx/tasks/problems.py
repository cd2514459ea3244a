"""Word problems of several steps, answered with their working and a last line '#### n'."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from dlx.tasks.task import Draft
from dlx.tasks.words import BOXES, ITEMS, NAMES, WOMEN

WORK = {"reads": "pages", "writes": "lines", "paints": "cards", "packs": "boxes"}
PERCENTS = [5, 10, 15, 20, 25, 40, 50, 75]
KINDS = 9  # the first four are event chains


def problem(rng: Random) -> Draft:
    """A word problem of two to eight steps; meta is the number asked for."""
    who, friend = rng.sample(NAMES, 2)
    scene = Scene(who, friend, rng.choice(ITEMS), rng.choice(BOXES))
    kind = rng.randrange(KINDS)
    question, steps, answer = _chain(rng, scene) if kind < 4 else OTHERS[kind - 4](rng, scene)
    return Draft(" ".join(question), "\n".join(steps) + f"\n#### {answer}", answer)


class Scene(NamedTuple):
    """Who the problem is about, and what is counted."""

    who: str
    friend: str
    items: str
    boxes: str

    @property
    def she(self) -> str:
        return "She" if self.who in WOMEN else "He"

    @property
    def her(self) -> str:
        return "her" if self.who in WOMEN else "his"


class Problem(NamedTuple):
    question: list[str]
    steps: list[str]
    answer: int


class Event(NamedTuple):
    sentence: str
    steps: list[str]
    left: int


def _chain(rng: Random, scene: Scene) -> Problem:
    """Two to four events that change one number."""
    who, items = scene.who, scene.items
    n = rng.randint(3, 60)
    question, steps = [f"{who} has {n} {items}."], [f"{who} starts with {n} {items}."]
    for _ in range(rng.randint(2, 4)):
        event = _event(rng, scene, n)
        question.append(event.sentence)
        steps += [step + "." for step in event.steps]
        n = event.left
    when = rng.choice(["now", "in the end"])
    question.append(f"How many {items} does {who} have {when}?")
    return Problem(question, steps, n)


def _event(rng: Random, scene: Scene, n: int) -> Event:
    who, friend, items, boxes = scene
    she = scene.she
    kind = rng.randrange(6)
    if kind == 0:
        x = rng.randint(2, 40)
        told = rng.choice([f"{she} buys", f"{friend} gives {who}", f"{she} finds"])
        return Event(f"{told} {x} more.", [f"{n} + {x} = {n + x}"], n + x)
    if kind == 1 and n > 3:
        x = rng.randint(1, n - 1)
        told = rng.choice([f"{she} gives {x} to {friend}.", f"{she} loses {x} of them.", f"{she} sells {x}."])
        return Event(told, [f"{n} - {x} = {n - x}"], n - x)
    if kind == 2:
        x, y = rng.randint(2, 9), rng.randint(2, 12)
        told = f"{she} buys {x} {boxes} with {y} {items} in each."
        return Event(told, [f"{x} * {y} = {x * y}", f"{n} + {x * y} = {n + x * y}"], n + x * y)
    if kind == 3 and n < 150:
        x = rng.choice([2, 2, 3])
        grows = rng.choice(["doubles", "becomes twice as large"]) if x == 2 else "triples"
        return Event(f"Then the number of {items} {grows}.", [f"{n} * {x} = {n * x}"], n * x)
    if kind == 4 and n % 2 == 0 and n > 3:
        told = rng.choice([f"{she} gives half of them to {friend}.", f"{she} loses half of them."])
        return Event(told, [f"{n} / 2 = {n // 2}"], n // 2)
    x = rng.randint(1, 9)
    giver = rng.choice(["mother", "uncle", "teacher", "sister"])
    return Event(f"{she} gets {x} {items} from {scene.her} {giver}.", [f"{n} + {x} = {n + x}"], n + x)


def _change(rng: Random, scene: Scene) -> Problem:
    """Two prices, two quantities, and the change."""
    who, items = scene.who, scene.items
    price, other_price = rng.randint(2, 15), rng.randint(2, 15)
    n, m = rng.randint(2, 9), rng.randint(2, 9)
    others = rng.choice([item for item in ITEMS if item != items])
    cost, other_cost = price * n, other_price * m
    total = cost + other_cost
    paid = (total // 10 + rng.randint(1, 5)) * 10
    question = [
        f"{who} buys {n} {items} for ${price} each and {m} {others} for ${other_price} each.",
        f"{scene.she} pays with ${paid}. How much change does {who} get?",
    ]
    steps = [
        f"The {items} cost {n} * {price} = {cost} dollars.",
        f"The {others} cost {m} * {other_price} = {other_cost} dollars.",
        f"The total is {cost} + {other_cost} = {total} dollars.",
        f"The change is {paid} - {total} = {paid - total} dollars.",
    ]
    return Problem(question, steps, paid - total)


def _rate(rng: Random, scene: Scene) -> Problem:
    """So many an hour, hours a day, days."""
    who = scene.who
    rate, hours, days = rng.randint(3, 30), rng.randint(2, 9), rng.randint(2, 7)
    does = rng.choice(list(WORK))
    things, a_day = WORK[does], rate * hours
    question = [
        f"{who} {does} {rate} {things} per hour.",
        f"{scene.she} works {hours} hours a day. How many {things} does {who} finish in {days} days?",
    ]
    steps = [
        f"In one day {who} finishes {rate} * {hours} = {a_day} {things}.",
        f"In {days} days {who} finishes {a_day} * {days} = {a_day * days} {things}.",
    ]
    return Problem(question, steps, a_day * days)


def _together(rng: Random, scene: Scene) -> Problem:
    """Three people, two comparisons, one sum."""
    who, friend, items, _ = scene
    n, times = rng.randint(3, 40), rng.choice([2, 3, 4, 5])
    fewer = rng.randint(1, n)
    second, third = n * times, n * times - fewer
    other = rng.choice([name for name in NAMES if name not in (who, friend)])
    question = [
        f"{who} has {n} {items}.",
        f"{friend} has {times} times as many {items} as {who}.",
        f"{other} has {fewer} fewer {items} than {friend}.",
        "How many do the three of them have together?",
    ]
    steps = [
        f"{friend} has {n} * {times} = {second} {items}.",
        f"{other} has {second} - {fewer} = {third} {items}.",
        f"{who} and {friend} have {n} + {second} = {n + second} {items}.",
        f"Together they have {n + second} + {third} = {n + second + third} {items}.",
    ]
    return Problem(question, steps, n + second + third)


def _share(rng: Random, scene: Scene) -> Problem:
    """A division without remainder, after a subtraction."""
    who, items = scene.who, scene.items
    friends, each, kept = rng.randint(2, 9), rng.randint(2, 15), rng.randint(1, 20)
    shared = friends * each
    question = [
        f"{who} has {shared + kept} {items}.",
        f"{scene.she} keeps {kept} and shares the rest equally among {friends} friends.",
        f"How many {items} does each friend get?",
    ]
    steps = [
        f"{who} shares {shared + kept} - {kept} = {shared} {items}.",
        f"Each friend gets {shared} / {friends} = {each} {items}.",
    ]
    return Problem(question, steps, each)


def _percent(rng: Random, scene: Scene) -> Problem:
    """So many percent more or fewer than a round number."""
    items = scene.items
    n, percent = rng.randint(2, 30) * 20, rng.choice(PERCENTS)
    if n * percent % 100:
        n *= 5
    part = n * percent // 100
    less = rng.random() < 0.5
    sign, word, answer = ("-", "fewer", n - part) if less else ("+", "more", n + part)
    question = [
        f"A shop had {n} {items} on Monday. On Tuesday it had {percent}% {word}.",
        f"How many {items} did it have on Tuesday?",
    ]
    steps = [
        f"{percent}% of {n} is {n} * {percent} / 100 = {part}.",
        f"On Tuesday the shop had {n} {sign} {part} = {answer} {items}.",
    ]
    return Problem(question, steps, answer)


OTHERS = (_change, _rate, _together, _share, _percent)
