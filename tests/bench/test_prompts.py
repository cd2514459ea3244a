"""The work of a prefill is counted as a loop over its positions would, and a first block is timed as it is decoded."""

from __future__ import annotations

from pathlib import Path

import pytest

from dlx.bench import How, Scene
from dlx.bench.prompts import begun, first_block, prefill, prefill_flops
from dlx.errors import ConfigError

CPU = How(graphs="off", device="cpu")


@pytest.mark.parametrize("tokens", [16, 100, 160])
def test_prefill_needs_the_matmuls_of_each_position_and_its_visible_keys(nano: Path, tokens: int) -> None:
    worker = Scene(nano, 16, 64, 1, 4).worker(CPU, 256)
    E, F, H, G, D, layers = 96, 256, 3, 1, 32, 3  # tests/data/nano/config.json
    matmuls = attention = 0
    for position in range(tokens // 16 * 16):
        matmuls += 2 * layers * (E * (H + 2 * G) * D + H * D * E + 2 * E * F + F * E)
        keys = (position // 16 + 1) * 16
        attention += layers * H * (2 * keys * D + 2 * keys * D)  # q · kᵀ, then · v
    assert prefill_flops(worker, tokens) == {"matmuls": matmuls, "attention": attention}


@pytest.mark.parametrize(("context", "accept", "forwards"), [(64, 4, 4), (64, 16, 1), (72, 4, 2), (64, 5, 4)])
def test_the_first_block_takes_as_many_forwards_as_its_tokens_need(
    nano: Path, context: int, accept: int, forwards: int
) -> None:
    worker = Scene(nano, 16, context, 1, accept).worker(CPU, 256)
    found = first_block(worker, context)
    assert found["forwards"] == forwards
    assert found["ms"]["n"] == 5 and found["ms"]["p50"] > found["prefill_ms"]["p50"] > 0


def test_a_long_prompt_is_prefilled_in_chunks_and_all_of_them_are_timed(nano: Path) -> None:
    worker = Scene(nano, 16, 64, 1, 4).worker(CPU, 256)
    worker.shapes = worker.shapes._replace(tokens=worker.shapes.tokens[:1])
    assert worker.shapes.tokens == (64,)
    found = prefill(worker, 160, rate=1e12)
    assert found["forwards"] == 3
    work = sum(found["flops"].values())
    assert found["of_matmul_rate"] == pytest.approx(work / found["ms"]["p50"] * 1e3 / 1e12)


def test_a_prompt_is_dropped_once_its_first_block_is_committed(nano: Path) -> None:
    worker = Scene(nano, 16, 64, 1, 4).worker(CPU, 256)
    assert [b.nfe for b in begun(worker, 64)] == [4] * 5
    assert worker.in_flight == 0 and worker.buf.done.all()


def test_a_prompt_without_a_complete_block_is_refused(nano: Path) -> None:
    with pytest.raises(ConfigError, match="7 tokens"):
        begun(Scene(nano, 16, 64, 1, 4).worker(CPU, 256), 7)
