"""Clocks count what they are told to time, and leave what they watch as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dlx.bench import How, Scene
from dlx.bench.clock import Replays, between_ms, counted_syncs, intervals, spread
from dlx.graphs.prefill import Stretch
from dlx.scheduler import Plan

CPU = torch.device("cpu")


def test_each_call_has_its_time_and_warm_ones_have_none() -> None:
    calls: list[int] = []
    times = intervals(lambda: calls.append(1), 7, CPU, warm=2)
    assert len(calls) == 9 and len(times) == 7
    assert all(ms >= 0 for ms in times)


def test_the_interval_between_marks_is_in_milliseconds() -> None:
    assert between_ms(1.25, 1.5) == pytest.approx(250)


def test_the_spread_is_the_median_and_the_slowest_in_a_hundred() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"p50": 2.0, "p99": 3.0, "n": 3}
    assert spread([float(i) for i in range(200)])["p99"] == 198.0


def test_without_a_gpu_no_sync_is_counted() -> None:
    with counted_syncs(CPU) as syncs:
        torch.ones(1).item()
    assert syncs.n is None


def test_replays_are_told_apart_by_kind_and_watched_no_longer_than_asked(nano: Path) -> None:
    worker = Scene(nano, 16, 48, 2, 4).worker(How("off", "cpu"), 128)
    chunk = Stretch([5] * 16, 0, [0])
    with Replays(worker) as replays:
        worker.launch(Plan([chunk, chunk], {}, 1, {}))
        worker.launch(Plan([], {}, 2, {}))
    worker.launch(Plan([chunk], {}, 1, {}))
    kinds = [key[0] for key in replays.keys if isinstance(key, tuple)]
    assert kinds == ["prefill", "step", "step"]  # two prompts go together
    assert [len(replays.ms(kind)) for kind in ("prefill", "step")] == [1, 2]
    assert all(ms > 0 for ms in replays.ms("step"))
