"""The tasks give the streams and verdicts of the generator that made the bundled model's training data."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import pytest

from dlx.errors import ConfigError
from dlx.tasks import MIX, TASKS, Sample, check, held, installed, sample
from dlx.tasks.code import run

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / "tasks.json").read_text())
needs_templates = pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed")


def golden_tasks() -> list[Any]:
    marks = {"rgsm": needs_templates}
    return [
        pytest.param(
            entry,
            id=f"{entry['task']}-{'held' if entry['held'] else 'seen'}",
            marks=marks.get(entry["task"], ()),
        )
        for entry in GOLDEN["tasks"]
    ]


def as_json(value: object) -> object:
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("entry", golden_tasks())
def test_a_task_draws_the_recorded_samples(entry: dict[str, Any]) -> None:
    rng = Random(entry["seed"])
    for expected in entry["samples"]:
        drawn = sample(rng, {entry["task"]: 1.0}, want_held=entry["held"])
        wanted = [entry["task"], expected["prompt"], expected["answer"], expected["meta"]]
        assert as_json(drawn) == wanted


@pytest.mark.parametrize("entry", golden_tasks())
def test_a_checker_gives_the_recorded_verdicts(entry: dict[str, Any]) -> None:
    for expected in entry["samples"]:
        drawn = Sample(entry["task"], expected["prompt"], expected["answer"], expected["meta"])
        assert check(drawn, expected["answer"])
        for text, verdict in expected["verdicts"]:
            assert check(drawn, text) is verdict, text


@needs_templates
def test_the_mix_draws_the_recorded_prompts() -> None:
    rng = Random(GOLDEN["mix"]["seed"])
    drawn = [sample(rng, MIX) for _ in GOLDEN["mix"]["prompts"]]
    assert [[one.task, one.prompt] for one in drawn] == GOLDEN["mix"]["prompts"]


def test_training_never_sees_a_held_out_prompt_and_evaluation_sees_no_other() -> None:
    rng = Random(0)
    open_tasks = {name: 1.0 for name in TASKS if name != "rgsm" and not TASKS[name].closed}
    seen = [sample(rng, open_tasks) for _ in range(300)]
    asked = [sample(rng, open_tasks, want_held=True) for _ in range(30)]
    assert not any(held(one.task, one.prompt) for one in seen)
    assert all(held(one.task, one.prompt) for one in asked)


def test_a_closed_task_holds_nothing_out() -> None:
    rng = Random(0)
    assert not any(held("facts", sample(rng, {"facts": 1.0}, want_held=True).prompt) for _ in range(100))


def test_the_mix_has_eleven_tasks_and_sums_to_one() -> None:
    assert len(MIX) == 11
    assert sum(MIX.values()) == pytest.approx(1.0)
    assert all(task.name == name for name, task in TASKS.items())


def test_an_unknown_task_is_named_with_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match="'chess' is unknown; choose from gsm, rgsm"):
        sample(Random(0), {"chess": 1.0})


def test_a_task_without_its_package_is_left_out_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dlx.tasks.find_spec", lambda name: None)
    assert installed({"gsm": 0.5, "rgsm": 0.5}) == {"gsm": 0.5}
    assert "'rgsm' is left out: it needs the package reasoning_gym" in caplog.text


def test_a_task_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from dlx.tasks.symbolic import _templates

    _templates.cache_clear()
    monkeypatch.setitem(sys.modules, "reasoning_gym.arithmetic.gsm_symbolic", None)
    with pytest.raises(ConfigError, match="pip install reasoning-gym"):
        sample(Random(0), {"rgsm": 1.0})


def test_importing_the_tasks_imports_neither_the_templates_nor_torch() -> None:
    code = "import sys, dlx.tasks; assert not {'reasoning_gym', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(
    "source",
    [
        "import os",
        "def solve(xs):\n    for x in xs:\n        xs = 1\n    return xs",
        "def solve(xs):\n    for x in xs:\n        print(x)\n    return 1",
        "def solve(xs):\n    for x in xs:\n        x.clear()\n    return 1",
        "def solve(xs):\n    for x in xs:\n        while True:\n            x += 1\n    return x",
        "def solve(xs):\n    for x in xs:\n        for y in xs:\n            x += y\n    return x",
        "def solve(xs):\n    return xs[0]",
    ],
)
def test_code_outside_the_whitelist_does_not_run(source: str) -> None:
    with pytest.raises(ValueError, match=r"not|assigned|only"):
        run(source, "solve")


def test_code_runs_on_every_input() -> None:
    source = "def solve(xs):\n    total = 0\n    for x in xs:\n        total += x\n    return total"
    assert run(source, "solve") == [85, 6, 0, 49]
