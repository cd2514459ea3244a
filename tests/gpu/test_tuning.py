"""Launch configurations searched in the very step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dlx.bench import Scene
from dlx.bench.tuning import tune
from dlx.provenance import slug

pytestmark = pytest.mark.gpu


def test_what_a_step_asks_for_is_searched_and_recorded(tiny: Path, tmp_path: Path) -> None:
    trials = tmp_path / "trials"
    tune([Scene(tiny, 16, 256, 1, 4)], ["linear"], 20.0, tmp_path, trials, "python tune")
    record = json.loads((tmp_path / slug(torch.cuda.get_device_name()) / "linear.json").read_text())
    entries = {tuple(entry["key"]): entry for entry in record["configs"]}
    assert {(key[0], key[1]) for key in entries} == {(rows, kind) for rows in (16, 32) for kind in range(3)}
    assert all(entry["commits"] == (key[0] == 32) for key, entry in entries.items())  # then there are two blocks of 16
    assert all(0 < entry["step_ms"] <= entry["default_step_ms"] for entry in entries.values())
    assert len({line for line in trials.read_text().splitlines() if json.loads(line)["us"]}) > 3 * len(entries)
