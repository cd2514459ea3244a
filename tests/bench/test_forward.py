"""What a record of latency says is what was measured, by its own definitions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dlx.bench import How, Scene, latency
from dlx.bench.forward import idle, speed
from dlx.bench.report import sentence
from dlx.bench.scene import Decoded
from dlx.bench.trace import Owned, Trace

CPU = How(graphs="off", device="cpu")


def test_idle_is_what_of_the_wall_time_no_forward_ran() -> None:
    done = Decoded(tokens_per_forward=4.0, nfe=100, forwards=100, wall_s=0.8, launches_s=0.76, syncs=0)
    two = Trace([Owned("a", 5, 0), Owned("a", 5, 2)], 2)
    found = idle(7.0, done, two)
    assert found["share"] == pytest.approx(1 - 7.0 * 100 / 800)
    assert found["outside_share"] == pytest.approx(0.05)
    assert (found["wall_ms"], found["launches_ms"]) == (pytest.approx(8.0), pytest.approx(7.6))
    assert found["gap_us"] == 2


def test_without_a_gpu_only_the_time_outside_of_launches_is_idle() -> None:
    found = idle(None, Decoded(1.0, 4, 4, 1.0, 0.5, None), None)
    assert found["share"] is None and found["gap_us"] is None
    assert found["outside_share"] == 0.5


def test_the_ratio_is_to_the_bytes_at_the_bandwidth_of_the_run() -> None:
    found = speed([9.0, 8.0, 10.0, 7.0], {"weights": 12_000_000, "kv": 4_000_000}, bandwidth=4e9)
    assert found["floor_ms"] == pytest.approx(3.0) and found["floor_with_kv_ms"] == pytest.approx(4.0)
    assert found["ratio"] == pytest.approx(8.5 / 3) and found["ratio_with_kv"] == pytest.approx(8.5 / 4)
    assert found["ms_per_forward"] == {"mean": 8.5, "p50": 8.5, "p99": 10.0, "n": 4}


def test_a_record_holds_the_whole_measurement(nano: Path) -> None:
    scene = Scene(nano, block=16, context=64, requests=2, accept=4)
    record = latency(scene, CPU, 6, "python bench", prefill_tokens=128, first=True)
    again = json.loads(json.dumps(record, default=str))
    assert again["scene"]["shape"] == "nano" and again["policy"]["select"] == {"rule": "Fixed", "k": 4}
    assert again["ms_per_forward"]["n"] == 6
    assert again["tokens_per_forward"] == 4.0
    assert again["ratio"] == pytest.approx(again["ms_per_forward"]["mean"] / again["floor_ms"])
    assert again["floor_ms"] == pytest.approx(again["floor_bytes"]["weights"] / again["read_gbps"] / 1e6)
    # 5 + 6 forwards of 4 tokens behind 64: two blocks are full, and the third is under way
    assert again["floor_bytes"]["kv"] == 3 * 2 * 32 * 4 * (2 * (64 + (64 + 2 * 16)) // 2)
    assert again["loop"] == {"forwards": 1, "route": None}
    assert again["host_syncs"] is None and again["kernels_per_step"] is None
    assert again["prefill"]["tokens"] == 128 and again["first_block"]["forwards"] == 4
    assert again["made"]["command"] == "python bench"
    said = sentence(record)
    assert "nano block 16, 2 at 64" in said and "4.00 tokens per forward" in said and "step by step" in said


def test_a_loop_is_timed_by_the_forward(nano: Path) -> None:
    scene = Scene(nano, block=16, context=64, requests=1, accept=4)
    record = latency(scene, CPU._replace(forwards=8), 8, "python bench")
    assert record["loop"] == {"forwards": 8, "route": "unrolled"}
    assert record["tokens_per_forward"] == 4.0
    assert record["ms_per_forward"]["n"] == 3  # launches
    assert "8 forwards a launch (unrolled)" in sentence(record)


def test_decoding_may_be_left_out(nano: Path) -> None:
    record = latency(Scene(nano, 16, 64, 1, 16), CPU, 0, "python bench", first=True)
    assert "ms_per_forward" not in record
    assert record["first_block"]["forwards"] == 1
    assert sentence(record).startswith("nano block 16, 1 at 64: first block of 64: ")
