"""Every key of the field is in the table, and every field of dlx that the table names is there."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from dlx.config import Config
from dlx.graphs import rules
from dlx.graphs.policies import Policy
from dlx.harness.keys import ENGINE, EVAL, PROFILER, SAMPLING, Key
from dlx.harness.options import Options
from dlx.profile import Profile
from dlx.request import SamplingParams
from tools import readme

ROOT = Path(__file__).parents[2]
FIELD = json.loads((ROOT / "tests" / "data" / "field_keys.json").read_text())
PAGE = (ROOT / "docs" / "keys.md").read_text()
ALL = {**ENGINE, **EVAL, **PROFILER}
MODELS = {"Config": set(Config.model_fields), "Options": set(Options.model_fields)}


def fields(name: str) -> set[str]:
    """The fields of the class that a row names."""
    if name in MODELS:
        return MODELS[name]
    values = {"Policy": Policy, "SamplingParams": SamplingParams, "Profile": Profile}
    return {field.name for field in dataclasses.fields(values.get(name) or getattr(rules, name))}


@pytest.mark.parametrize("group", FIELD)
def test_every_key_of_the_field_has_a_row_on_the_page(group: str) -> None:
    assert not [key for key in FIELD[group] if f"| `{key}` |" not in PAGE]


def test_a_run_file_may_have_every_key_of_its_sections() -> None:
    assert {*FIELD["engine"], *FIELD["thresholds"], *FIELD["dmax"], *FIELD["moe"], *FIELD["runtime"]} <= set(ENGINE)
    assert {*FIELD["diffusion_gemma"], *FIELD["distributed"]} <= set(ENGINE)
    assert set(FIELD["sampling"]) == set(SAMPLING)
    assert set(FIELD["run file"]) <= {*ENGINE, *EVAL}
    assert set(FIELD["profiler"]) == set(PROFILER)


@pytest.mark.parametrize("name", [name for name, key in ALL.items() if key.to])
def test_the_field_of_dlx_that_a_row_names_is_there(name: str) -> None:
    owner, _, field = ALL[name].to.partition(".")
    assert field in fields(owner)


@pytest.mark.parametrize("name", [name for name, key in ALL.items() if not key.to])
def test_a_key_without_a_field_has_a_reason(name: str) -> None:
    assert len(ALL[name].why) > 10


@pytest.mark.parametrize("name", [name for name, key in ALL.items() if key.why.startswith("as ")])
def test_a_row_that_points_to_another_points_to_one(name: str) -> None:
    match = re.match(r"as `?([a-z_]+)`?", ALL[name].why)
    assert match
    assert match[1] in ALL or match[1] == "it"


def test_the_page_says_what_the_table_says() -> None:
    assert readme.filled(PAGE, "keys", readme.keys()) == PAGE


def test_a_row_says_what_is_accepted_of_a_key_without_a_field() -> None:
    table = readme.rows({"one": Key("G", "", "no place", (1, "x")), "two": Key("G", "Policy.N", "blocks")})
    assert "| `one` | | no place; `1` or `x` alone is accepted |" in table
    assert "| `two` | `Policy.N` | blocks |" in table
