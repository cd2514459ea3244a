"""Throughput serves every request through the engine, and its parts add up to the wall time."""

from __future__ import annotations

from pathlib import Path

import pytest

from dlx.bench import How, Scene, throughput
from dlx.bench.load import roof, serve
from dlx.bench.report import sentence

CPU = How(graphs="off", device="cpu")


@pytest.mark.parametrize("forwards", [1, 8])
def test_all_requests_are_served_at_the_forced_schedule(nano: Path, forwards: int) -> None:
    scene = Scene(nano, block=16, context=40, requests=5, accept=4)
    record = throughput(scene, CPU._replace(forwards=forwards), 40, 2, "python bench")
    assert record["tokens"] == 5 * 40
    # 40 = 8 after the prompt's tail and two blocks of 16: 2 + 4 + 4 forwards
    assert record["nfe"] == 5 * 10
    assert record["forwards"] == 3 * 10  # two at once, two at once, one
    assert record["tokens_per_forward"] == 4.0
    assert record["tokens_per_s"] == pytest.approx(200 / record["wall_s"])
    parts = record["prefill_s"] + record["decode_s"] + record["idle"]["s"]
    assert parts == pytest.approx(record["wall_s"]) and record["idle"]["s"] > 0
    assert record["prefill_s"] > 0  # no prompt is found in the cache of the run before
    assert record["scene"]["rows"] == 2 and record["scene"]["max_tokens"] == 40
    roof = record["roof"]
    least = {name: max(roof["memory_s"][name], roof["compute_s"][name]) for name in ("prefill", "decode")}
    assert roof["least_s"] == pytest.approx(sum(least.values()))
    assert roof["share"] == pytest.approx(roof["least_s"] / record["wall_s"]) and 0 < roof["share"] < 1
    assert "5 requests of 40 + 40 tokens, 2 at once: 200 tokens" in sentence(record)


def test_every_launch_has_the_forwards_that_it_ran(nano: Path) -> None:
    scene = Scene(nano, block=16, context=32, requests=3, accept=8)
    engine = scene.engine(CPU._replace(forwards=3), 128, rows=3)
    run = serve(engine, scene, 64)
    assert run.launched == [3, 3, 2]  # 64 tokens, 8 a forward
    assert len(run.replays.ms("step")) == 3 and len(run.replays.ms("prefill")) == 1
    assert [r.prompt for r in run.requests] != [run.requests[0].prompt] * 3


def test_all_requests_decode_at_once_unless_told_otherwise(nano: Path) -> None:
    record = throughput(Scene(nano, 16, 32, 3, 16), CPU, 32, None, "python bench")
    assert record["scene"]["rows"] == 3
    assert record["forwards"] == 2


def test_a_roof_counts_what_must_be_computed(nano: Path) -> None:
    scene = Scene(nano, block=16, context=32, requests=3, accept=4)
    engine = scene.engine(CPU, 96, rows=3)
    run = serve(engine, scene, 64)
    worker = engine.worker
    found = roof(worker, scene, run, {"weights": 1000, "kv": 24}, 1e9, 1e12)
    # layers of hidden 64: qkv, out, gate and up, down
    card = worker.card
    qkv = card.hidden * card.head_dim * (card.heads + 2 * card.kv_heads)
    each = qkv + card.hidden * card.head_dim * card.heads + 3 * card.hidden * card.ffn
    dense, attend, head = 2 * card.layers * each, 4 * card.heads * card.head_dim * card.layers, card.hidden * card.vocab
    seen = 16 * 16 + 16 * 32  # two blocks of the prompt
    assert found["compute_s"]["prefill"] * 1e12 == pytest.approx(3 * (32 * dense + attend * seen))
    decoded = 3 * 16 * (16 * (dense + attend * 64 + 2 * head) + 4 * (dense + attend * 64))
    assert found["compute_s"]["decode"] * 1e12 == pytest.approx(decoded)
    assert found["memory_s"]["decode"] == pytest.approx(16 * 1024 / 1e9)
