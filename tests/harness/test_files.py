"""Run files of the field: what each key becomes, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dlx.errors import ConfigError, PolicyError
from dlx.graphs.policies import POLICIES, Policy
from dlx.graphs.rules import Calm, Canvas, Hard, Merge, Smooth, Stable, SubBlock, Within
from dlx.harness.files import read, translated
from dlx.harness.options import Options, options

LINE_6 = """
engine:
  model_path: {model}
  tokenizer_path: {model}
  model_name: sdar
  decoding_strategy: multi_bd
  block_size: 16
  buffer_size: 2
  max_model_len: 512
eval:
  dataset_name: tiny_add2
  dataset_limit: 4
  temperature: 0.0
  max_tokens: 32
  max_nfe: 64
  output_dir: {out}
  save_results: true
  include_path: {include}
  confirm_run_unsafe_code: false
"""


def file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def policy(**engine: Any) -> Policy:
    return translated(engine, {})["llm"]["policy"]


def test_every_key_of_a_run_file_arrives(tmp_path: Path) -> None:
    found = read(file(tmp_path, LINE_6.format(model="models/sdar", out="runs", include="my-tasks")))
    assert found["llm"]["policy"] == Policy(N=2)
    assert {name: value for name, value in found["llm"].items() if name != "policy"} == {
        "model": "models/sdar",
        "block_length": 16,
        "max_model_len": 512,
    }
    assert found["params"] == {"temperature": 0.0, "max_tokens": 32, "max_nfe": 64}
    assert options(**found) == Options(
        tasks=("tiny_add2",),
        limit=4,
        out=Path("runs"),
        save_results=True,
        include_path=Path("my-tasks"),
        family=("sdar",),
        llm=found["llm"],
        params=found["params"],
    )


def test_the_bundled_model_has_a_name() -> None:
    assert translated({"model_path": "tiny"}, {})["llm"] == {}


@pytest.mark.parametrize(
    ("engine", "made"),
    [
        ({"decoding_strategy": "block_diffusion", "buffer_size": 1}, POLICIES["single_bd"]),
        ({"decoding_strategy": "multi_bd", "sampling_mode": "edit", "buffer_size": 1}, POLICIES["edit"]),
        ({"decoding_strategy": "d2f"}, POLICIES["d2f"]),
        ({"decoding_strategy": "dmax"}, POLICIES["dmax"]),
        ({"decoding_strategy": "fast_dllm_v2"}, POLICIES["fast_dllm_v2_cached"]),
        ({"decoding_strategy": "fast_dllm_v2", "fdv2_use_block_cache": False}, POLICIES["fast_dllm_v2"]),
        ({"decoding_strategy": "diffusion_gemma"}, POLICIES["diffusion_gemma"]),
        ({"decoding_strategy": "hierarchical"}, POLICIES["hierarchical"]),
    ],
)
def test_a_strategy_is_the_policy_of_its_name(engine: dict[str, Any], made: Policy) -> None:
    assert policy(**engine) == made


def test_sub_blocks_of_fast_dllm_v2_make_a_block() -> None:
    found = translated({"decoding_strategy": "fast_dllm_v2", "block_size": 4, "buffer_size": 8}, {})["llm"]
    assert found["block_length"] == 32
    assert (found["policy"].select, found["policy"].turn) == (Within(4), SubBlock(4))


def test_token_merge_is_a_rule_with_its_numbers() -> None:
    dmax = {"decoding_strategy": "dmax"}
    assert policy(**dmax, token_merge_renormalize=False).embed == Merge(renormalise=False)
    assert policy(**dmax, token_merge_weight=0).embed == Hard()
    smooth = {"token_merge_mode": "iter_smooth_topk", "token_merge_top_k": 3, "token_merge_weight": 0.5}
    assert policy(**dmax, **smooth).embed == Smooth(k=3, weight=0.5, first=0.5)


def test_edits_have_their_limit() -> None:
    assert policy(decoding_strategy="multi_bd", sampling_mode="edit", max_post_edit_steps=3).settle == Calm(limit=3)


def test_a_canvas_has_its_numbers() -> None:
    at = "diffusion_gemma_"
    said = {"max_denoising_steps": 9, "stability_threshold": 3, "t_min": 0.1, "t_max": 0.7, "confidence_threshold": 0.2}
    engine = {"decoding_strategy": "diffusion_gemma", **{at + name: value for name, value in said.items()}}
    found = translated({**engine, "diffusion_gemma_entropy_bound": 0.3}, {})
    assert found["llm"]["policy"].canvas == Canvas(9, hot=0.7, cold=0.1)
    assert found["llm"]["policy"].settle == Stable(2, 0.2)
    assert found["params"] == {"threshold": 0.3}


def test_flat_thresholds_go_before_those_of_the_mapping() -> None:
    engine = {
        "decoding_strategy": "multi_bd",
        "sampling_mode": "edit",
        "decoding_thresholds": {"add_block": 0.2, "semi_complete": 0.8, "accept": 0.7, "edit": 0.5},
        "accept_threshold": 0.6,
        "token_stability_threshold": 0.4,
    }
    assert translated(engine, {})["params"] == {
        "open_at": 0.2,
        "force_at": 0.8,
        "threshold": 0.6,
        "edit": 0.5,
        "stability": 0.4,
    }


def test_a_number_that_no_rule_reads_is_refused_unless_it_asks_for_nothing() -> None:
    engine = {"decoding_strategy": "multi_bd", "token_stability_threshold": 0.0}
    assert translated(engine, {})["params"] == {}
    with pytest.raises(ConfigError, match=r"remask_threshold=0.4 cannot be had: of policies that remask"):
        translated({"decoding_strategy": "multi_bd", "remask_threshold": 0.4}, {})


def test_sizes_machine_and_stops_arrive() -> None:
    engine = {"max_num_reqs": 4, "page_size": 32, "num_pages": -1, "device_ids": [1], "enforce_eager": True, "eos": 7}
    engine |= {"gpu_memory_utilization": 0.8, "enable_prefix_caching": False, "max_num_batched_tokens": 512}
    found = translated(engine, {"ignore_eos": True})
    assert found["llm"] == {
        "max_num_seqs": 4,
        "page_size": 32,
        "device": "cuda:1",
        "graphs": "off",
        "gpu_memory_utilization": 0.8,
        "prefix_caching": False,
        "max_num_batched_tokens": 512,
    }
    assert found["params"] == {"ignore_eos": True, "stop_token_ids": (7,)}


def test_an_adapter_is_merged() -> None:
    assert translated({"use_lora": True, "lora_path": "a"}, {})["llm"] == {"lora": "a"}
    assert translated({"use_lora": False, "lora_path": "a"}, {})["llm"] == {}


def test_guards_are_of_the_policy() -> None:
    engine = {"decoding_strategy": "multi_bd", "auto_max_nfe_warmup_steps": 8}
    found = translated(engine, {"max_repetition_run": 16})["llm"]["policy"]
    assert found == Policy(N=4, auto_max_nfe=8, max_repetition_run=16)


def test_settings_and_parameters_have_their_own_names_too(tmp_path: Path) -> None:
    text = "engine:\n  policy: multi_bd\n  dtype: float32\n  page_size: 32\neval:\n  threshold: 0.8\n  seed: 3"
    found = read(file(tmp_path, text))
    assert found["llm"] == {"policy": "multi_bd", "dtype": "float32", "page_size": 32}
    assert found["params"] == {"threshold": 0.8, "seed": 3}


@pytest.mark.parametrize(
    ("engine", "evals", "said"),
    [
        ({"tensor_parallel_size": 2}, {}, "tensor_parallel_size=2 cannot be had: dlx decodes on one GPU"),
        ({"attn_impl": "naive"}, {}, "attn_impl='naive' cannot be had"),
        ({"kv_cache_layout": "distinct"}, {}, "only 'unified' is accepted"),
        ({"penalty_lambda": 0.5}, {}, "penalty_lambda=0.5"),
        ({"device_ids": [0, 1]}, {}, "name one, and start a process a GPU"),
        ({"model_path": "a", "tokenizer_path": "b"}, {}, "tokenizer_path='b'"),
        ({"model_name": "gpt"}, {}, "model_name='gpt' cannot be had: use one of dream"),
        ({"use_lora": True}, {}, "name the adapter's folder with lora_path"),
        ({"decoding_strategy": "beam"}, {}, "decoding_strategy='beam'"),
        ({"sampling_mode": "fast", "decoding_strategy": "d2f"}, {}, "sampling_mode='fast'"),
        ({"decoding_strategy": "d2f", "sampling_mode": "edit"}, {}, "d2f does not edit"),
        ({"decoding_strategy": "multi_bd", "token_merge_top_k": 2}, {}, "'multi_bd' has no place for it"),
        ({"decoding_strategy": "dmax", "token_merge_top_k": 2}, {}, "token_merge_top_k=2"),
        ({"decoding_strategy": "dmax", "token_merge_mode": "mean"}, {}, "use dmax_topk or iter_smooth_topk"),
        ({"decoding_strategy": "multi_bd", "diffusion_gemma_t_max": 1.0}, {}, "diffusion_gemma_t_max=1.0"),
        ({"buffer_size": 2}, {}, "decoding_strategy is missing beside buffer_size"),
        ({"enforce_eager": "yes"}, {}, "enforce_eager='yes' cannot be had: use true or false"),
        ({"block_size": "4"}, {}, "block_size='4' cannot be had: use a whole number"),
        ({"decoding_thresholds": {"accepted": 1}}, {}, "use a mapping of add_block"),
        ({}, {"dataset_name": ["a"]}, "dataset_name="),
        ({"max_num_reqs": 4, "max_num_seqs": 8}, {}, "max_num_seqs=8 cannot be had: a key of the field says 4"),
        ({"accept_threshold": 0.9}, {"threshold": 0.8}, "threshold=0.8 cannot be had: a key of the field says 0.9"),
        ({}, {"max_repetition_run": 8}, "name a decoding_strategy beside it"),
    ],
)
def test_what_dlx_cannot_do_is_refused_by_name(engine: dict[str, Any], evals: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("[", r"\[")):
        translated(engine, evals)


def test_numbers_that_a_policy_does_not_allow_are_refused_by_it() -> None:
    with pytest.raises(PolicyError, match="N=64 decoding blocks"):
        translated({"decoding_strategy": "multi_bd", "buffer_size": 64}, {})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("engine:\n  blok_size: 4", "engine has no key 'blok_size'; did you mean block_size"),
        ("eval:\n  shots: 4", "eval has no key 'shots'"),
        ("bench: {}", "has a section 'bench'"),
        ("engine: 4", "engine is a int"),
        ("- a", "holds a list"),
        ("engine:\n  block_size: 4\n  block_size: 8", "twice"),
        ("engine: !!python/object:os.system {}", "tag"),
        ("engine: {", "run.yaml"),
    ],
)
def test_a_file_that_is_no_run_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read(file(tmp_path, text))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        read(tmp_path / "none.yaml")
