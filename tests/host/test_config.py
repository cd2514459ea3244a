"""What was left open is filled in for the machine, and what cannot work is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from dlx import LLM, SamplingParams
from dlx.config import TINY, Config, bind, buckets, geometry
from dlx.environment import environment
from dlx.errors import ConfigError, PolicyError
from dlx.graphs.policies import POLICIES, Policy
from dlx.graphs.rules import Whole
from dlx.models.card import Card
from dlx.weights import read_config


@pytest.fixture(scope="module")
def card(tiny: Path) -> Card:
    """The bundled model's: blocks of 16 or 32, 2,048 positions."""
    return Card.from_hf(*read_config(tiny))


def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def config(**values: Any) -> Config:
    return Config.from_args(**{"device": "cpu", **values})


def test_a_machine_without_a_gpu_runs_eager_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    without_gpu(monkeypatch)
    c = Config.from_args()
    assert (c.model, c.device, c.graphs, c.dtype) == (TINY, "cpu", "off", "float32")
    assert (c.policy, c.max_num_seqs, c.load_format) == (None, 8, "safetensors")
    assert c.torch_dtype is torch.float32


def test_a_machine_with_a_gpu_captures_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu(monkeypatch)
    c = Config.from_args()
    assert (c.device, c.graphs, c.dtype, c.torch_dtype) == ("cuda", "capture", "bfloat16", torch.bfloat16)
    assert Config.from_args(device="cuda:1", graphs="compile").device == "cuda:1"
    on_cpu = Config.from_args(device="cpu")
    assert (on_cpu.graphs, on_cpu.dtype) == ("off", "float32")


def test_what_is_given_is_kept() -> None:
    policy = Policy(N=2, accept=0.5)
    c = config(model="some/folder", policy=policy, graphs="compile", dtype="bfloat16", page_size=32, seed=3)
    assert (c.model, c.policy, c.graphs, c.dtype) == (Path("some/folder"), policy, "compile", "bfloat16")
    assert (c.page_size, c.seed, c.num_pages, c.max_model_len) == (32, 3, None, None)


def test_a_configuration_does_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        config().max_num_seqs = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", list(POLICIES))
def test_a_policy_is_named_or_given(name: str) -> None:
    assert config(policy=name).policy == config(policy=POLICIES[name]).policy == POLICIES[name]
    assert name in POLICIES


@pytest.mark.parametrize("policy", ["multi", "", "SINGLE_BD", 5, [], Policy])
def test_an_unknown_policy_is_named_with_those_there_are(policy: object) -> None:
    with pytest.raises(PolicyError) as caught:
        config(policy=policy)
    assert f"policy={policy!r} is unknown" in str(caught.value)
    assert ", ".join(POLICIES) in str(caught.value)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"device": "mps"}, ["device='mps'", "use cpu or cuda"]),
        ({"device": "gpu:0"}, ["device='gpu:0'", "use cpu or cuda"]),
        ({"device": "cpu:first"}, ["device='cpu:first'"]),
        ({"device": 5}, ["device=5"]),
        ({"device": "cuda"}, ["device='cuda'", "no CUDA device", "use device='cpu'"]),
        ({"device": "cuda:1", "graphs": "off"}, ["device='cuda:1'", "no CUDA device", "use device='cpu'"]),
        ({"graphs": "capture"}, ["graphs='capture'", "needs a CUDA device", "off, compile"]),
        ({"graphs": "jit"}, ["graphs='jit'", "'off', 'compile' or 'capture'"]),
        ({"dtype": "float16"}, ["dtype='float16'", "'float32' or 'bfloat16'"]),
        ({"dtype": torch.float32}, ["dtype=torch.float32", "'float32' or 'bfloat16'"]),
        ({"model": 5}, ["model=5"]),
        ({"block_length": 0}, ["block_length=0", "1"]),
        ({"block_length": 257}, ["block_length=257", "256"]),
        ({"max_num_seqs": 0}, ["max_num_seqs=0", "1"]),
        ({"max_num_seqs": -3}, ["max_num_seqs=-3", "1"]),
        ({"max_num_seqs": 1025}, ["max_num_seqs=1025", "1024"]),
        ({"max_num_seqs": 1.5}, ["max_num_seqs=1.5", "integer"]),
        ({"max_num_seqs": float("nan")}, ["max_num_seqs=nan"]),
        ({"max_num_seqs": "many"}, ["max_num_seqs='many'", "integer"]),
        ({"max_model_len": 0}, ["max_model_len=0", "1"]),
        ({"page_size": 0}, ["page_size=0", "1"]),
        ({"page_size": 2048}, ["page_size=2048", "1024"]),
        ({"num_pages": 0}, ["num_pages=0", "1"]),
        ({"num_pages": 2**80}, ["num_pages=1208925819614629174706176"]),
        ({"load_format": "pickle"}, ["load_format='pickle'", "'safetensors' or 'dummy'"]),
        ({"seed": -1}, ["seed=-1", "0"]),
        ({"seed": 2**80}, ["seed=1208925819614629174706176"]),
        ({"max_seqs": 4}, ["max_seqs=4", "max_num_seqs"]),
    ],
)
def test_what_is_not_allowed_is_named_with_what_is(
    values: dict[str, Any], parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_gpu(monkeypatch)
    with pytest.raises(ConfigError) as caught:
        config(**values)
    assert [part for part in parts if part not in str(caught.value)] == []
    assert "pydantic" not in str(caught.value)


def test_the_block_length_is_the_arguments_then_the_policys_then_the_models(card: Card) -> None:
    assert bind(Policy(), card, None).L == 16
    assert bind(Policy(L=32), card, None).L == 32
    assert bind(Policy(L=32), card, 16).L == 16
    assert bind(Policy(N=4, accept=0.3), card, 32) == Policy(L=32, N=4, full=False, accept=0.3)


def test_the_policy_and_what_a_prompt_sees_are_the_models_where_none_is_asked_for(card: Card) -> None:
    free = replace(card, full=True, policy="d2f")
    assert bind(None, card, None) == Policy(L=16, full=False)
    assert bind(None, free, None) == Policy(L=16, N=4, full=True)
    assert bind(Policy(N=2), free, 24) == Policy(L=24, N=2, full=True)
    with pytest.raises(PolicyError, match=r"full=True does not suit .* block-causal; use policy='single_bd'"):
        bind(POLICIES["d2f"], card, None)
    with pytest.raises(PolicyError, match=r"full=False does not suit .* all-to-all; use policy='d2f'"):
        bind(Policy(full=False), free, None)


@pytest.mark.parametrize(("policy", "block_length"), [(Policy(), 8), (Policy(L=64), None), (Policy(L=16), 4)])
def test_a_block_length_the_model_was_not_trained_for_is_refused(
    card: Card, policy: Policy, block_length: int | None
) -> None:
    with pytest.raises(PolicyError) as caught:
        bind(policy, card, block_length)
    assert f"blocks of {block_length or policy.L} tokens" in str(caught.value)
    assert "trained with 16, 32; use block_length=16" in str(caught.value)


def test_the_bundled_model_runs_at_its_second_block_length(tiny: Path) -> None:
    with LLM(tiny, graphs="off", device="cpu", block_length=32) as llm:
        assert (llm.policy.L, llm.engine.worker.shapes.S) == (32, 32)
        (output,) = llm.generate([{"role": "user", "content": "What is 2 + 3?"}], SamplingParams(max_tokens=48))
        assert output.finish_reason == "stop"
        assert "5" in output.text


@pytest.mark.parametrize(
    ("values", "L", "expected"),
    [
        ({}, 4, (16, 2048)),
        ({}, 12, (24, 2048)),
        ({}, 16, (16, 2048)),
        ({}, 32, (32, 2048)),
        ({"page_size": 64}, 32, (64, 2048)),
        ({"page_size": 16, "max_model_len": 100}, 16, (16, 100)),
        ({"max_model_len": 2048}, 16, (16, 2048)),
        ({"max_model_len": 1}, 16, (16, 1)),
    ],
)
def test_pages_are_whole_blocks_and_rows_no_longer_than_the_model(
    card: Card, values: dict[str, int], L: int, expected: tuple[int, int]
) -> None:
    assert geometry(config(**values), card, L) == expected


@pytest.mark.parametrize(
    ("values", "L", "message"),
    [
        ({"page_size": 48}, 32, "page_size=48 is not a multiple of the block length 32; use 64"),
        ({"page_size": 8}, 16, "page_size=8 is not a multiple of the block length 16; use 16"),
        ({"max_model_len": 2049}, 16, "max_model_len=2049 passes the 2048 positions of the model; use at most that"),
    ],
)  # fmt: skip
def test_a_geometry_that_does_not_fit_is_refused_with_one_that_does(
    card: Card, values: dict[str, int], L: int, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        geometry(config(**values), card, L)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("values", "policy", "most"),
    [
        ({}, Policy(), 2048),
        ({"max_num_batched_tokens": 512}, Policy(), 512),
        ({"max_num_batched_tokens": 8192}, Policy(), 2048),
        ({"batch_invariant": True}, Policy(), 256),
        ({"max_num_seqs": 1}, Policy(), 320),
        ({"max_num_batched_tokens": 64}, Policy(full=True), 320),
        ({"max_num_batched_tokens": 64}, Policy(turn=Whole()), 320),
    ],
)
def test_the_largest_prefill_holds_prompts_of_all_rows_or_one_that_sees_itself_whole(
    card: Card, values: dict[str, int], policy: Policy, most: int
) -> None:
    made = config(max_model_len=300, **values)
    assert buckets(made, card, replace(policy, L=16)).tokens[-1] == most


@pytest.mark.parametrize(("text", "threads"), [("3", 3), ("", None), ("0", None), ("-1", None), ("two", None)])
def test_the_environment_gives_a_number_of_threads_or_none(
    monkeypatch: pytest.MonkeyPatch, text: str, threads: int | None
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert environment().threads == threads


def test_the_users_home_may_be_written_as_a_tilde(nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(nano.parent))
    with LLM("~/nano", graphs="off", device="cpu") as llm:
        assert llm.generate([5], SamplingParams(max_tokens=1))[0].tokens == 1
