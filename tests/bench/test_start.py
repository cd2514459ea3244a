"""Start-up is measured in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from dlx.bench import How, Scene, startup
from dlx.bench.report import sentence
from dlx.errors import ConfigError, EngineError

CPU = How(graphs="off", device="cpu")


@pytest.mark.parametrize(("most", "prefill"), [(2048, 256), (128, 128)])
def test_a_cold_start_makes_the_buckets_asked_for(nano: Path, most: int, prefill: int) -> None:
    how = CPU._replace(max_num_batched_tokens=most)
    record = startup(Scene(nano, 16, 64, 1, 4), how, [4, 1], 100, "single_bd", "python bench", starts=["cold"])
    cold = record["cold"]
    assert record["packed"] is None
    assert list(cold["graphs_s"]) == [f"prefill {prefill}", "step 4", "step 1"]
    assert cold["ready_s"] > cold["imports_s"] > 0
    assert cold["ready_s"] >= cold["imports_s"] + sum(cold["graphs_s"].values())
    assert cold["weights_s"] > 0
    assert sentence(record).startswith("nano buckets 1, 4, prefill 100; cold: ready after ")


def test_a_start_without_buckets_is_refused(nano: Path) -> None:
    with pytest.raises(ConfigError, match="buckets"):
        startup(Scene(nano, 16, 64, 1, 4), CPU, [], 64, "single_bd", "python bench")


def test_what_the_process_says_when_it_fails_is_told(nano: Path) -> None:
    with pytest.raises(EngineError, match="no_such_policy"):
        startup(Scene(nano, 16, 64, 1, 4), CPU, [1], 64, "no_such_policy", "python bench", starts=["cold"])


@pytest.mark.long
def test_a_packed_start_is_faster_than_a_cold_one(nano: Path) -> None:
    how = CPU._replace(graphs="compile")
    record = startup(Scene(nano, 16, 64, 1, 4), how, [1], 0, "single_bd", "python bench")
    assert record["packed"]["pack_s"] > 0
    assert record["packed"]["graphs_s"]["step 1"] < 0.5 * record["cold"]["graphs_s"]["step 1"]
