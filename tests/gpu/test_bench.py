"""What is measured on a GPU: routes, kernels, syncs, and the parts of a step."""

from __future__ import annotations

from pathlib import Path

import pytest

from dlx.bench import How, Scene, latency, roofline, throughput

pytestmark = pytest.mark.gpu

CAPTURED = How(graphs="capture", device="cuda")


@pytest.mark.parametrize(
    ("forwards", "unroll", "route"), [(1, False, None), (16, False, "while"), (16, True, "unrolled")]
)
def test_a_forward_is_timed_without_a_host_sync(tiny: Path, forwards: int, unroll: bool, route: str | None) -> None:
    how = CAPTURED._replace(forwards=forwards, unroll=unroll)
    record = latency(Scene(tiny, 16, 256, 1, 4), how, 32, "python bench", prefill_tokens=256, first=True)
    assert record["loop"] == {"forwards": forwards, "route": route}
    assert record["host_syncs"] == 0
    assert record["tokens_per_forward"] == 4.0
    assert 0 < record["ms_per_forward"]["p50"] < 50
    assert record["idle"]["share"] < 1 and record["idle"]["outside_share"] < 1
    assert record["idle"]["gap_us"] is not None and record["idle"]["gap_us"] >= 0
    assert 5 <= record["kernels_per_layer"] <= 9
    assert record["kernels_per_step"] > 6 * record["kernels_per_layer"]
    assert 0 < record["prefill"]["of_matmul_rate"] < 1
    assert record["first_block"]["ms"]["p50"] > record["first_block"]["prefill_ms"]["p50"] > 0


def test_many_requests_are_served_without_a_host_sync(tiny: Path) -> None:
    record = throughput(Scene(tiny, 16, 100, 6, 4), CAPTURED, 60, 4, "python bench")
    assert record["host_syncs"] == 0
    assert record["tokens"] == 6 * 60
    assert 0 < record["prefill_s"] + record["decode_s"] < record["wall_s"]


def test_every_op_of_a_step_owns_kernels_of_its_trace(tiny: Path) -> None:
    record = roofline(Scene(tiny, 16, 256, 1, 4), CAPTURED, "python bench")
    assert {row["op"] for row in record["rows"]} == {
        "positions", "project", "kv_store", "attention", "accumulate", "candidates",
    }  # fmt: skip
    for row in record["rows"]:
        assert row["kernels"] >= row["calls"] and row["kernels"] % row["calls"] == 0, row
        assert row["us"] > 0
    parts = sum(row["us"] for row in [*record["rows"], *record["others"]]) + record["gaps_us"]
    assert parts == pytest.approx(record["traced_us"])
