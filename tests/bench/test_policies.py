"""What a policy's rules cost: timed from one state, beside a schedule that opens the same window."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dlx.bench import How, Scene
from dlx.bench.policies import Pinned, policies, table
from dlx.errors import PolicyError
from dlx.graphs.policies import POLICIES
from tools import bench

CPU = How(graphs="off", device="cpu")


@pytest.fixture
def scene(nano: Path) -> Scene:
    return Scene(nano, block=16, context=48, requests=2, accept=4)


def test_a_policy_stands_beside_a_schedule_of_its_own_window(scene: Scene) -> None:
    (*_, record) = policies(scene, CPU, ["multi_bd", "dmax", "fast_dllm_v2_cached"], 3, "c")
    for name, run in record["runs"].items():
        assert run["policy"]["N"] == POLICIES[name].N
        assert run["ms_per_forward"]["n"] == run["fixed_ms_per_forward"]["n"] == 3
        want = run["ms_per_forward"]["p50"] / run["fixed_ms_per_forward"]["p50"] - 1
        assert run["overhead"] == pytest.approx(want)
    assert len(record["runs"]) == 3


def test_every_forward_begins_in_one_state(scene: Scene) -> None:
    with torch.no_grad():
        pinned = Pinned.of(scene, CPU, POLICIES["dmax"], 400)
        buf, seen = pinned.at.worker.buf, []
        for _ in range(2):
            pinned.restore()
            seen.append([buf.tok.clone(), buf.age.clone(), *(t.clone() for t in buf.mem.values())])
            pinned.at.launch()
            pinned.at.launch()
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert not torch.equal(buf.age, seen[0][1])


def test_a_policy_with_scopes_is_timed_in_its_last_one(scene: Scene) -> None:
    policy = POLICIES["fast_dllm_v2_cached"]
    assert policy.turn is not None and len(policy.turn.scopes) > 1
    with torch.no_grad():
        pinned = Pinned.of(scene, CPU, policy, 400)
        before = pinned.at.worker.buf.age.clone()
        for _ in range(2):
            pinned.restore()
            pinned.at.launch()
    assert isinstance(pinned.at.key, tuple) and pinned.at.key[:3] == ("step", 2, len(policy.turn.scopes) - 1)
    assert torch.equal(pinned.at.worker.buf.age, before + 1)  # all rows take part


def test_what_does_not_suit_the_shape_says_why(scene: Scene) -> None:
    (*_, record) = policies(scene, CPU, ["fast_dllm_v1", "diffusion_gemma"], 1, "c")
    assert "trained block-causal" in record["runs"]["fast_dllm_v1"]["left_out"]
    assert "left out: full=True does not suit" in table(record["runs"])


def test_without_names_only_policies_that_are_not_there_are_timed(scene: Scene) -> None:
    there = {name: {"left_out": "before"} for name in POLICIES if name != "edit"}
    (record,) = policies(scene, CPU, [], 1, "c", there)
    assert set(record["runs"]) == set(POLICIES) and "overhead" in record["runs"]["edit"]
    with pytest.raises(PolicyError, match="unknown"):
        next(policies(scene, CPU, ["best"], 1, "c"))


def test_the_command_adds_to_its_record(nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "policies.json"
    for name in ("single_bd", "edit"):
        argv = ["policies", name, "--shape", str(nano), "--context", "32", "--device", "cpu", "--rounds", "1"]
        assert bench.main([*argv, "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert set(record["runs"]) == {"single_bd", "edit"}
    assert record["runs"]["edit"]["made"]["command"].startswith("python tools/bench.py policies edit --shape")
    assert capsys.readouterr().out.count("ms a forward") == 2
