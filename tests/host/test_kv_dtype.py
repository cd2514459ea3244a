"""Decoding with fp8 pages: rows do not know their neighbours, and graphs give the same text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dlx import LLM, SamplingParams
from dlx.bench.scene import How, Scene, floor_bytes, stand
from dlx.config import Config
from dlx.errors import ConfigError
from dlx.request import Output

PROMPTS = [[40 + i % 50 for i in range(at, at + n)] for at, n in ((0, 3), (7, 16), (20, 45), (3, 90))]
PARAMS = [SamplingParams(max_tokens=40, temperature=t, seed=5, ignore_eos=True) for t in (0.0, 0.8, 0.0, 0.8)]
KINDS = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def said(outputs: list[Output]) -> list[tuple[list[int], int]]:
    return [(o.token_ids, o.nfe) for o in outputs]


def answers(folder: Path, prompts: list[list[int]] = PROMPTS, **values: Any) -> list[tuple[list[int], int]]:
    with LLM(folder, device="cpu", dtype="float32", max_model_len=256, **{"graphs": "off", **values}) as llm:
        return said(llm.generate(prompts, PARAMS[: len(prompts)]))


@pytest.mark.parametrize("kind", KINDS)
def test_pages_have_the_dtype_that_is_asked_for(nano: Path, kind: str) -> None:
    with LLM(nano, device="cpu", graphs="off", kv_cache_dtype=kind) as llm:
        assert {pages.dtype for pages in llm.engine.worker.kv} == {KINDS[kind]}
        llm.generate(PROMPTS, PARAMS)
        assert (llm.engine.worker.kv[0].float() != 0).any()


def test_bf16_pages_are_those_of_a_bf16_model(nano: Path) -> None:
    with LLM(nano, device="cpu", graphs="off", dtype="bfloat16", kv_cache_dtype="bf16") as llm:
        assert {pages.dtype for pages in llm.engine.worker.kv} == {torch.bfloat16}
    with pytest.raises(ConfigError, match=r"kv_cache_dtype='bf16' does not go with dtype='float32'"):
        Config.from_args(nano, device="cpu", dtype="float32", kv_cache_dtype="bf16")


def test_e4m3_pages_are_refused_on_a_gpu_that_does_not_know_them(nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    Config.from_args(nano, device="cuda", kv_cache_dtype="fp8_e5m2")
    with pytest.raises(ConfigError, match=r"kv_cache_dtype='fp8' needs a GPU of sm_89 or above.*'fp8_e5m2'"):
        Config.from_args(nano, device="cuda", kv_cache_dtype="fp8")


@pytest.mark.parametrize("policy", ["single_bd", "multi_bd"])
def test_a_row_of_fp8_pages_does_not_know_its_neighbours(nano: Path, policy: str) -> None:
    together = answers(nano, policy=policy, kv_cache_dtype="fp8", max_num_seqs=4)
    with LLM(
        nano, policy=policy, device="cpu", graphs="off", dtype="float32", kv_cache_dtype="fp8", max_num_seqs=4,
        max_model_len=256,
    ) as llm:  # fmt: skip
        alone = [said(llm.generate([prompt], [params]))[0] for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
    assert together == alone


@pytest.mark.slow
def test_the_compiled_step_says_the_same_with_fp8_pages(nano: Path) -> None:
    eager, compiled = (
        answers(nano, PROMPTS[1:3], policy="multi_bd", graphs=graphs, kv_cache_dtype="fp8", max_num_seqs=2)
        for graphs in ("off", "compile")
    )
    assert eager == compiled


def test_a_bench_counts_and_fills_fp8_pages(nano: Path) -> None:
    scene = Scene(nano, 16, 48, 2, 4)
    wide, small = (scene.worker(How("off", "cpu", "bfloat16", kv_cache_dtype=kind), 128) for kind in (None, "fp8"))
    assert 2 * floor_bytes(small, 1000)["kv"] == floor_bytes(wide, 1000)["kv"]
    stand(small, scene)
    assert small.kv[0].dtype == torch.float8_e4m3fn
    assert (small.kv[0].float() != 0).float().mean() > 0.95


@pytest.mark.parametrize("kind", ["fp8_e4m3", "fp8_e5m2"])
def test_recorded_accuracy_with_fp8_pages_is_within_a_hundredth(kind: str) -> None:
    runs = Path(__file__).parents[2] / "profiles" / "runs" / "cpu"
    small, wide = (json.loads((runs / f"tiny--single_bd{name}.json").read_text()) for name in (f"--{kind}", ""))
    assert (small["run"]["kv_dtype"], small["prompts"]["n"], len(small["prompts"]["tasks"])) == (
        str(KINDS[kind]).removeprefix("torch."), wide["prompts"]["n"], len(wide["prompts"]["tasks"]),
    )  # fmt: skip
    assert abs(small["thresholds"]["0.9"]["accuracy"] - wide["thresholds"]["0.9"]["accuracy"]) <= 0.01
