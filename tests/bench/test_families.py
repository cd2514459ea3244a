"""Every family is measured by the same tools, and its floor counts what its forwards read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dlx.bench import How, Scene, floor_bytes, latency, stand, throughput
from dlx.bench.calls import touched
from dlx.bench.families import decoded, loaded
from dlx.bench.prompts import prefill_flops
from dlx.bench.report import sentence
from dlx.config import bind
from dlx.graphs.policies import POLICIES
from dlx.models.card import Card
from tests import families, gemma
from tools import families as tool

CPU = How(graphs="off", device="cpu")
NAMES = [*sorted(set(families.FAMILIES) - {"diffucoder", "fast_dllm_v2_tied"}), "diffusion_gemma"]
CONFIGS = Path(__file__).parents[1] / "data" / "configs"


def shape(folder: Path, name: str) -> Path:
    """config.json of a tiny model of the family."""
    raw = gemma.published() if name == "diffusion_gemma" else families.config(name)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(raw))
    return path


def scene(folder: Path, name: str, requests: int = 1, accept: int = 2, context: int = 40) -> Scene:
    path = shape(folder, name)
    block = Card.from_hf(json.loads(path.read_text()), {}).blocks[0]
    return Scene(path, block, context, requests, accept)


class Spy(TorchDispatchMode):
    """The ids that every call of `experts` is given."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == "dlx::experts":
            self.ids.append(args[1].clone())
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", NAMES)
def test_every_family_is_timed_prefilled_and_answers(tmp_path: Path, name: str) -> None:
    here = scene(tmp_path, name)
    run = decoded(here, CPU, 3, 12)
    is_canvas = name == "diffusion_gemma"
    assert run["ms_per_forward"]["n"] == 3 and run["ratio"] > 0
    assert run["answer"]["tokens"] == 12 and (is_canvas or run["answer"]["nfe"] >= 6)  # two a forward
    assert is_canvas or run["tokens_per_forward"] == 2.0
    assert (run["experts_touched"] is None) == (here.card().mixture is None)
    assert (run["floor_note"] is not None) == is_canvas
    assert run["prefill"]["tokens"] == 40 and run["prefill"]["flops"]["matmuls"] > 0


@pytest.mark.parametrize("name", ["sdar_moe", "llada2", "diffusion_gemma"])
def test_experts_touched_are_the_distinct_ones_that_rows_at_work_choose(tmp_path: Path, name: str) -> None:
    here = scene(tmp_path, name, requests=3)  # of a bucket of 4: one row is idle
    worker = here._replace(requests=4).worker(CPU, 96)
    at = stand(worker, here)
    with Spy() as spy:
        found = touched(at, 2)
    assert found is not None
    layers = len(found["layers"])
    assert len(spy.ids) == 2 * layers == 2 * (worker.card.layers - (name == "llada2"))
    for ids in spy.ids:
        assert (ids.view(4, -1)[3] == -1).all()  # the idle row
    distinct = [len({int(i) for i in ids.flatten() if i >= 0}) for ids in spy.ids]
    assert found["layers"] == [(distinct[i] + distinct[i + layers]) / 2 for i in range(layers)]
    assert found["mean"] == pytest.approx(sum(found["layers"]) / layers)
    assert found["of"] == (17 if name == "llada2" else 8)


def test_the_floor_reads_the_experts_that_are_touched_and_no_others(tmp_path: Path) -> None:
    worker = scene(tmp_path, "sdar_moe").worker(CPU, 96)
    expert = 3 * 64 * 24 * 4  # gate, up and down of E 64 and F 24, fp32
    every, some = (floor_bytes(worker, 0, 1, n)["weights"] for n in (8, 2.5))
    assert every == floor_bytes(worker, 0)["weights"]
    assert every - some == 3 * 5.5 * expert


def test_sliding_layers_read_the_keys_of_their_window(tmp_path: Path) -> None:
    worker = scene(tmp_path, "diffusion_gemma").worker(CPU, 96)
    sliding, wide = 2 * 2 * 16, 2 * 1 * 32  # two layers each: heads and channels of tests/gemma.py
    for tokens, rows in ((3, 1), (40, 1), (40, 2)):
        seen = min(tokens, rows * (gemma.WINDOW - 1))
        assert floor_bytes(worker, tokens, rows)["kv"] == 4 * 2 * (sliding * seen + wide * tokens)


@pytest.mark.parametrize("name", ["dream", "fast_dllm_v2", "sdar_moe", "llada_moe", "llada2", "diffusion_gemma"])
@pytest.mark.parametrize("tokens", [24, 29])
def test_the_work_of_a_prefill_is_that_of_each_position_in_a_loop(tmp_path: Path, name: str, tokens: int) -> None:
    worker = scene(tmp_path, name).worker(CPU, 96)
    card, L = worker.card, worker.step
    m, g = card.mixture, card.gemma
    last = tokens if card.full else (tokens - card.shift) // L * L
    E, H = card.hidden, card.heads
    matmuls = attention = 0
    for i, (G, D) in enumerate(card.kv):
        alike = g is not None and g.everywhere[i]  # v is k
        weights = (H + (1 if alike else 2) * G) * D * E + H * D * E
        dense = m is None or i < m.dense
        weights += 3 * E * card.ffn if dense or g else 0
        if m is not None and not dense:
            weights += m.experts * E + 3 * E * m.ffn * m.active + 3 * E * m.shared
        for position in range(last):
            keys = tokens if card.full else (position // L + 1) * L
            keys = min(keys, g.window) if g and not alike else keys
            matmuls += 2 * weights
            attention += 4 * H * D * keys
    assert prefill_flops(worker, tokens) == {"matmuls": matmuls, "attention": attention}


def test_a_canvas_says_by_what_it_was_decoded(tmp_path: Path) -> None:
    record = latency(scene(tmp_path, "diffusion_gemma"), CPU, 4, "python bench")
    assert record["policy"]["select"]["rule"] == "EntropyBound"
    assert "reads it" in sentence(record) and "experts a layer" in sentence(record)


def test_a_loop_counts_the_experts_of_its_forwards(tmp_path: Path) -> None:
    record = latency(scene(tmp_path, "sdar_moe"), CPU._replace(forwards=6), 6, "python bench")
    assert 3 <= record["experts_touched"]["mean"] <= 8


def test_throughput_counts_the_experts_that_are_read(tmp_path: Path) -> None:
    record = throughput(scene(tmp_path, "sdar_moe", requests=3), CPU, 8, 2, "python bench")
    assert record["tokens"] == 24 and 3 <= record["experts_touched"]["mean"] <= 8


def test_the_tools_know_every_published_shape() -> None:
    def known(folder: Path) -> set[str]:
        return {json.dumps(json.loads(path.read_text()), sort_keys=True) for path in folder.glob("*.json")}

    assert known(CONFIGS) <= known(tool.SHAPES)
    for path in tool.SHAPES.glob("*.json"):
        block = Card.from_hf(json.loads(path.read_text()), {}).blocks[0]
        assert Scene(path, block, 64, 1, 4).card().blocks == (block,)
        here = Scene(path, block // 2, 64, 1, 4)
        assert here.card().blocks[0] == block // 2
        assert bind(here.policy(), here.card(), None).canvas == POLICIES[here.card().policy].canvas


@pytest.mark.parametrize("name", ["llada", "llada2", "diffusion_gemma"])
def test_weights_that_were_written_load_back_equal(tmp_path: Path, name: str) -> None:
    found = loaded(scene(tmp_path, name), torch.device("cpu"), tmp_path / "out")
    assert found["equal"] and found["gbps"] > 0 and found["files"] == 1
    assert found["bytes"] > 2 * 1e4 and not (tmp_path / "out").exists()


def test_runs_are_added_to_those_that_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "families.json"
    path.write_text(json.dumps({"runs": {"other": {"parameters": 5}}}))
    asked = ["--shapes", str(shape(tmp_path, "sdar")), "--device", "cpu", "--graphs", "off"]
    assert tool.main([*asked, "--steps", "3", "--prompt", "16", "--tokens", "8", "--json", str(path)]) == 0
    runs = json.loads(path.read_text())["runs"]
    assert list(runs) == ["other", "sdar"] and runs["sdar"]["answer"]["nfe"] == 2
    assert capsys.readouterr().out.startswith("sdar: 0.00 G parameters; ")
    assert runs["sdar"]["made"]["command"].startswith("python tools/families.py --shapes")


def test_a_family_that_fails_is_named_and_the_next_one_runs(tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text(json.dumps({"architectures": ["OddModelLM"]}))
    shapes = [tmp_path / "odd.json", shape(tmp_path, "sdar")]
    *_, (_, record) = tool.families(shapes, CPU, 3, 16, 10**6, "python bench")
    runs = record["runs"]
    assert "OddModelLM" in runs["odd"]["failed"] and "max_model_len" in runs["sdar"]["failed"]  # of its own process
    assert "failed: " in tool.line("odd", runs["odd"])
    assert "206 GB" in tool.line("flash", {"parameters": 1, "needs_bytes": 206e9})
