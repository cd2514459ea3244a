"""A step's time is parted among its kernels and the gaps between them, and nothing is lost."""

from __future__ import annotations

import random

import pytest

from dlx.bench.trace import Kernel, Owned, Trace, a_layer, owned
from dlx.graphs.nodes import CHOICE


def test_overlapping_kernels_own_what_they_do_once_those_before_have_ended() -> None:
    kernels = [Kernel("a", 0, 10), Kernel("b", 4, 16), Kernel("c", 20, 21), Kernel("d", 20.5, 20.7)]
    assert owned(kernels) == [Owned("a", 10, 0), Owned("b", 6, 0), Owned("c", 1, 4), Owned("d", 0, 0)]


def test_own_times_and_gaps_add_up_to_the_stretch() -> None:
    rng = random.Random(0)
    kernels = [Kernel("k", start, start + rng.random() * 4) for start in (rng.random() * 300 for _ in range(200))]
    parts = owned(rng.sample(kernels, len(kernels)))
    stretch = max(k.end for k in kernels) - min(k.start for k in kernels)
    covered = 0.0  # by brute force, in steps of a hundredth
    for i in range(30_400):
        covered += 0.01 * any(k.start <= i / 100 < k.end for k in kernels)
    assert sum(p.own_us + p.gap_us for p in parts) == pytest.approx(stretch)
    assert sum(p.own_us for p in parts) == pytest.approx(covered, rel=0.02)


def calls(n: int) -> list[Owned]:
    """n calls of four kernels: 3 µs before a call's first, 1 µs before its last."""
    one = [Owned("load", 2, 3), Owned("mul", 5, 0), Owned("mul", 7, 0), Owned("end", 1, 1)]
    return [*(one[0]._replace(gap_us=0), *one[1:]), *(one * (n - 1))]


def test_a_trace_of_equal_calls_knows_its_gaps_and_the_time_of_each_kernel() -> None:
    trace = Trace(calls(5), 5)
    assert trace.between_us() == 3
    assert trace.within_us() == 1
    assert trace.mean() == [("load", 2), ("mul", 5), ("mul", 7), ("end", 1)]


def test_the_table_counts_launches_of_one_call() -> None:
    assert Trace(calls(5), 5).table() == [
        {"name": "mul", "n": 2, "us": 12.0},
        {"name": "load", "n": 1, "us": 2.0},
        {"name": "end", "n": 1, "us": 1.0},
    ]


def test_a_trace_that_lost_a_kernel_claims_no_gaps() -> None:
    trace = Trace(calls(5)[:-1], 5)
    assert trace.between_us() is None
    assert trace.mean() == []
    assert {row["name"]: row["n"] for row in trace.table()} == {"mul": 2, "load": 1, "end": 0.8}


def test_kernels_of_a_layer_are_those_that_run_once_a_layer() -> None:
    table = [{"name": "mul", "n": 144}, {"name": "attend", "n": 36}, {"name": "head", "n": 1}, {"name": "odd", "n": 37}]
    assert a_layer(table, layers=36) == 4 + 1 + 1


def chosen(*kinds: str) -> list[Owned]:
    """Calls that begin with a choice: of two kernels of a kind, or, rare, of three."""
    return [Owned(name, 2, 1) for kind in kinds for name in (CHOICE, kind, kind, *["sum"] * (kind == "rare"))]


def test_calls_between_which_the_device_chooses_are_told_apart() -> None:
    trace = Trace(chosen("plain", "plain", "rare", "plain"), 4)
    assert [len(call) for call in trace.calls()] == [3, 3, 4, 3]
    assert trace.mean() == [(CHOICE, 2), ("plain", 2), ("plain", 2)]
    assert trace.between_us() == 1
    assert {row["name"]: row["n"] for row in trace.table()} == {CHOICE: 1, "plain": 2, "rare": 0, "sum": 0}
    assert {row["name"]: row["us"] for row in trace.table()} == {CHOICE: 2, "plain": 3, "rare": 1, "sum": 0.5}


def test_a_trace_that_lost_a_choice_claims_no_gaps() -> None:
    kernels = chosen("plain", "plain", "rare", "plain")
    for lost in (kernels[1:], kernels[:3] + kernels[4:]):
        assert Trace(lost, 4).between_us() is None and Trace(lost, 4).mean() == []
