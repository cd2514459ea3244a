"""A policy is a value that checks itself and tells all of itself."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dlx.errors import PolicyError
from dlx.graphs.policies import POLICIES, Policy, named
from dlx.graphs.rules import Canvas, Fixed


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("N", 0), ("N", 33), ("N", 1.5), ("N", "2"), ("N", True), ("L", 0), ("L", 257), ("L", "16"),
        ("accept", -0.1), ("accept", 1.1), ("accept", float("nan")), ("open_at", "x"), ("force_at", None),
        ("select", None), ("select", "Threshold"), ("settle", lambda c, w, tok: tok),
    ],
)  # fmt: skip
def test_a_field_outside_its_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(PolicyError, match=field):
        Policy(**{field: value})


def test_a_policy_is_described_whole() -> None:
    told = json.loads(json.dumps(Policy(N=2, select=Fixed(3)).describe()))
    assert told["select"] == {"rule": "Fixed", "k": 3}
    assert (told["N"], told["L"], told["accept"], told["open_at"], told["force_at"]) == (2, None, 0.9, 0.1, 0.9)
    assert told["settle"] == {"rule": "Filled"}


def test_a_canvas_is_described_and_checked() -> None:
    told = json.loads(json.dumps(POLICIES["diffusion_gemma"].describe()))
    assert told["canvas"] == {"steps": 48, "hot": 0.8, "cold": 0.4}
    assert told["settle"] == {"rule": "Stable", "forwards": 1, "below": 0.005}
    assert json.loads(json.dumps(Policy().describe()))["canvas"] is None
    for canvas in (Canvas(steps=0), Canvas(steps=True), Canvas(hot=0.1), Canvas(cold=0.0)):
        with pytest.raises(PolicyError, match=r"Canvas\(.* not allowed; use N=1"):
            Policy(canvas=canvas)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(PolicyError, match="'greedy' is unknown; use one of single_bd, multi_bd, fixed"):
        named("greedy")
    assert named("multi_bd") is POLICIES["multi_bd"]
