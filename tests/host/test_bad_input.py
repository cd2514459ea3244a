"""Whatever is wrong with a request, an argument or a checkpoint: a named error with the way out, and life goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dlx import LLM, Policy, SamplingParams
from dlx.errors import CapacityError, ConfigError, DlxError, ModelError, PolicyError, RequestError
from dlx.request import Finish

SHARD = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"
NAN = float("nan")
GATE = "model.layers.1.mlp.gate_proj.weight"
SHORT = SamplingParams(max_tokens=20, ignore_eos=True)


def missing(error: DlxError, parts: list[str]) -> list[str]:
    """Those parts that the message lacks."""
    return [part for part in parts if part not in str(error)]


def build(model: Path, **values: Any) -> LLM:
    return LLM(model, **{"graphs": "off", "device": "cpu", "max_num_seqs": 2, **values})


@pytest.fixture(scope="module")
def small(nano: Path) -> Iterator[LLM]:
    """64 tokens a row at most, and pages for one such row."""
    with build(nano, max_model_len=64, num_pages=3) as llm:
        yield llm


@pytest.fixture
def alive(small: LLM) -> Iterator[LLM]:
    """The same; after the test it must answer as before, with all its slots and pages."""
    before = small.generate("7 + 5 =", SHORT)[0]
    yield small
    after = small.generate("7 + 5 =", SHORT)[0]
    assert (after.token_ids, after.nfe) == (before.token_ids, before.nfe)
    assert small.engine.idle
    assert small.engine.scheduler.pool.free == 3


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("", ["the prompt is empty", "at least one token"]),
        ([[]], ["the prompt is empty", "at least one token"]),
        ([320], ["prompt[0]=320", "from 0 to 319"]),
        ([5, 6, -1], ["prompt[2]=-1", "from 0 to 319"]),
        ([5, 2**40], ["prompt[1]=1099511627776", "from 0 to 319"]),
        ([5, 6.0], ["prompt[1]=6.0", "pass integers from 0 to 319"]),
        ([5, True], ["prompt[1]=True", "pass integers from 0 to 319"]),
        ([5, None], ["prompt[1]=None", "pass integers from 0 to 319"]),
        ([5, 3], ["prompt[1]=3 is the mask id", "leave it out"]),
        ("a<|MASK|>b", ["prompt[1]=3 is the mask id", "leave it out"]),
        ([72] * 45, ["45 tokens", "max_tokens=20", "max_model_len=64", "shorten", "lower", "raise"]),
        ([72] * 29, ["needs 4 pages", "the pool has 3", "lower max_tokens or raise num_pages"]),
        ("lone \ud800", ["UTF-8", "remove lone surrogates"]),
        (None, ["prompts is a NoneType", "pass text, token ids, messages"]),
        (7, ["prompts is a int", "pass text, token ids, messages"]),
        (b"bytes", ["prompts is a bytes", "pass text"]),
        ({"role": "user", "content": "hi"}, ["prompts is a dict", "messages"]),
        (["a", 7], ["prompts[1] is a int", "pass text, token ids or messages"]),
        ([[5], None], ["prompts[1] is a NoneType", "pass text, token ids or messages"]),
        ([{"role": "user"}], ["message 0", "role and content"]),
        ([{"role": "user", "content": 5}], ["message 0", "int", "string"]),
        ([{"role": "user", "content": "hi"}, "hi"], ["message 1 is 'hi'", "role and content"]),
    ],
    ids=lambda value: repr(value)[:20] if not isinstance(value, list) else "",
)
def test_a_prompt_that_cannot_be_answered_is_refused(alive: LLM, prompt: Any, parts: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        alive.generate(prompt, SHORT)
    assert missing(caught.value, parts) == []


@pytest.mark.parametrize("prompt", [None, 7, 1.5, b"bytes", {"role": "user", "content": "hi"}, [5, 3], [], ""])
def test_a_stream_refuses_what_generate_refuses(alive: LLM, prompt: Any) -> None:
    with pytest.raises(RequestError, match="prompt"):
        next(alive.stream(prompt, SHORT))


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"max_tokens": 0}, ["max_tokens=0", "an integer from 1"]),
        ({"max_tokens": -5}, ["max_tokens=-5", "an integer from 1"]),
        ({"max_tokens": NAN}, ["max_tokens=nan", "an integer from 1"]),
        ({"max_tokens": 65}, ["max_tokens=65", "max_model_len=64", "lower max_tokens"]),
        ({"temperature": -0.5}, ["temperature=-0.5", "from 0 to 100"]),
        ({"temperature": NAN}, ["temperature=nan", "from 0 to 100"]),
        ({"temperature": float("inf")}, ["temperature=inf", "from 0 to 100"]),
        ({"threshold": -0.1}, ["threshold=-0.1", "from 0 to 1"]),
        ({"threshold": NAN}, ["threshold=nan", "from 0 to 1"]),
        ({"open_at": 1.5}, ["open_at=1.5", "from 0 to 1"]),
        ({"force_at": NAN}, ["force_at=nan", "from 0 to 1"]),
        ({"max_nfe": -1}, ["max_nfe=-1", "an integer from 1"]),
        ({"seed": -1}, ["seed=-1", "an integer from 0"]),
        ({"stop_token_ids": (-1,)}, ["stop_token_ids=-1", "an integer from 0"]),
        ({"stop_token_ids": (320,)}, ["320", "from 0 to 319"]),
        ({"stop_token_ids": (3,)}, ["3", "other than the mask id"]),
        ({"stop_token_ids": tuple(range(4, 12))}, ["9 stop ids", "at most 8"]),
        ({"ignore_eos": "yes"}, ["ignore_eos='yes'", "True or False"]),
    ],
    ids=str,
)
def test_parameters_out_of_range_are_refused(alive: LLM, values: dict[str, Any], parts: list[str]) -> None:
    bad = SamplingParams(**{"max_tokens": 8, **values})
    for ask in (lambda: alive.generate(["a", "b"], [SHORT, bad]), lambda: list(alive.stream("a", bad))):
        with pytest.raises(RequestError) as caught:
            ask()
        assert missing(caught.value, parts) == []


@pytest.mark.parametrize("params", [5, "fast", {"max_tokens": 8}, [None], ["fast"], [{"max_tokens": 8}]])
def test_what_are_no_parameters_is_refused(alive: LLM, params: Any) -> None:
    for ask in (lambda: alive.generate("a", params), lambda: list(alive.stream("a", params))):
        with pytest.raises(RequestError, match="SamplingParams"):
            ask()


def test_one_bad_prompt_of_many_stops_all_of_them_before_they_begin(alive: LLM) -> None:
    with pytest.raises(RequestError, match=r"prompt\[0\]=3 is the mask id"):
        alive.generate([[5], [6], [3]], SHORT)
    assert alive.engine.idle


@pytest.mark.parametrize(
    ("values", "error", "parts"),
    [
        ({"policy": "multi"}, (PolicyError,), ["'multi'", "single_bd, multi_bd"]),
        ({"block_length": 32}, (PolicyError,), ["32 tokens", "trained with 16", "block_length=16"]),
        ({"policy": Policy(L=4)}, (PolicyError,), ["4 tokens", "trained with 16", "block_length=16"]),
        ({"page_size": 24}, (ConfigError,), ["page_size=24", "block length 16", "use 32"]),
        ({"max_model_len": 4096}, (ConfigError,), ["max_model_len=4096", "2048"]),
        ({"max_num_seqs": 0}, (ConfigError,), ["max_num_seqs=0", "1"]),
        ({"num_pages": -1}, (ConfigError,), ["num_pages=-1", "1"]),
        ({"num_pages": 2**31 - 1, "page_size": 1024}, (CapacityError, ConfigError), ["num_pages=2147483647"]),
        ({"graphs": "capture"}, (ConfigError,), ["graphs='capture'", "off"]),
        ({"device": "tpu"}, (ConfigError,), ["device='tpu'", "cpu or cuda"]),
        ({"dtype": "int8"}, (ConfigError,), ["dtype='int8'", "'float32' or 'bfloat16'"]),
        ({"pages": 4}, (ConfigError,), ["pages=4", "no such setting"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_model_is_not_built_of_what_cannot_work(
    alive: LLM, nano: Path, values: dict[str, Any], error: tuple[type[DlxError], ...], parts: list[str]
) -> None:
    with pytest.raises(error) as caught:
        build(nano, **values)
    assert missing(caught.value, parts) == []


@pytest.mark.parametrize(
    "values", [{"N": 0}, {"N": 33}, {"L": 0}, {"L": 257}, {"accept": NAN}, {"open_at": -0.1}, {"force_at": 2}]
)
def test_an_impossible_policy_is_refused_when_it_is_made(values: dict[str, Any]) -> None:
    ((name, value),) = values.items()
    with pytest.raises(PolicyError) as caught:
        Policy(**values)
    assert missing(caught.value, [f"{name}={value}", "use"]) == []


@pytest.fixture
def copy(nano: Path, tmp_path: Path) -> Path:
    """The nano checkpoint, to be broken."""
    return Path(shutil.copytree(nano, tmp_path / "model"))


def refusal(folder: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        build(folder)
    return caught.value


def retold(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    """Rewrite the weights as one edited file."""
    tensors = load_file(folder / SHARD)
    edit(tensors)
    (folder / SHARD).unlink()
    (folder / INDEX).unlink()
    save_file(tensors, folder / "model.safetensors")
    return folder


def configured(folder: Path, **values: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def test_a_folder_that_is_not_there_is_told_with_how_to_fetch_one(alive: LLM, tmp_path: Path) -> None:
    folder = tmp_path / "nowhere"
    assert missing(refusal(folder), [f"the folder {folder} does not exist", "hf download"]) == []


def test_a_file_in_a_folders_place_is_told(alive: LLM, copy: Path) -> None:
    path = copy / "config.json"
    assert missing(refusal(path), [f"{path} is a file", f"name the checkpoint's folder, {copy}"]) == []


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", [None, "", "[1]"])
def test_a_file_that_is_missing_or_broken_is_named(alive: LLM, copy: Path, name: str, text: str | None) -> None:
    (copy / name).unlink()
    if text is not None:
        (copy / name).write_text(text)
    assert missing(refusal(copy), [str(copy), name, "fetch" if text is not None else "folder"]) == []


def test_a_folder_without_weights_is_told_what_it_lacks(alive: LLM, copy: Path) -> None:
    (copy / SHARD).unlink()
    assert missing(refusal(copy), [f"{copy} lacks {SHARD}", INDEX, "fetch"]) == []
    (copy / INDEX).unlink()
    assert missing(refusal(copy), [f"{copy} has no weights", "expected model.safetensors", INDEX]) == []


def test_pickled_weights_are_refused_with_a_way_to_convert_them(alive: LLM, copy: Path) -> None:
    for name in (SHARD, INDEX):
        (copy / name).unlink()
    torch.save({"a": torch.zeros(1)}, copy / "pytorch_model.bin")
    assert missing(refusal(copy), ["pickle", "pytorch_model.bin", "safetensors", "save_pretrained"]) == []


@pytest.mark.parametrize("keep", [0, 7, 1000, -1])
def test_a_truncated_shard_is_named(alive: LLM, copy: Path, keep: int) -> None:
    path = copy / SHARD
    path.write_bytes(path.read_bytes()[:keep])
    assert missing(refusal(copy), [f"{path} is truncated", "fetch the file again"]) == []


def test_a_damaged_header_is_named(alive: LLM, copy: Path) -> None:
    path = copy / SHARD
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])
    assert missing(refusal(copy), [str(path), "no safetensors file", "fetch the file again"]) == []


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, ["'LlamaForCausalLM'", "SDARForCausalLM"]),
        ({"architectures": []}, ["architectures", "SDARForCausalLM"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "silu"]),
        ({"hidden_size": None}, ["hidden_size is missing", "integer"]),
        ({"mask_token_id": 320}, ["mask_token_id=320", "319"]),
        ({"num_key_value_heads": 2}, ["num_key_value_heads=2", "num_attention_heads=3"]),
        ({"intermediate_size": 128}, [GATE, "[256, 96]", "[128, 96]", "config.json"]),
        ({"num_hidden_layers": 2}, ["model.layers.2.", "is extra", "config.json"]),
    ],
    ids=str,
)
def test_a_config_that_is_not_this_networks_is_refused(
    alive: LLM, copy: Path, values: dict[str, object], parts: list[str]
) -> None:
    assert missing(refusal(configured(copy, **values)), parts) == []


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (lambda t: t.pop(GATE), [f"{GATE} is missing", "[256, 96]"]),
        (lambda t: t.update(bias=torch.zeros(3)), ["bias is extra", "model.safetensors"]),
        (lambda t: t.update({GATE: t[GATE].T.contiguous()}), [f"{GATE} has shape [96, 256]", "[256, 96]"]),
        (lambda t: t.update({GATE: t[GATE].to(torch.int8)}), [f"{GATE} has dtype I8", "BF16"]),
    ],
    ids=["missing", "extra", "misshapen", "integers"],
)
def test_a_tensor_that_is_missing_extra_or_of_another_kind_is_named(
    alive: LLM, copy: Path, edit: Callable[[dict[str, Tensor]], object], parts: list[str]
) -> None:
    assert missing(refusal(retold(copy, edit)), [*parts, str(copy), "same checkpoint"]) == []


def test_weights_that_are_not_finite_end_a_request_as_an_error(copy: Path) -> None:
    with build(retold(copy, lambda t: t["model.norm.weight"].fill_(NAN))) as llm:
        for output in llm.generate(["a", [72] * 20], SHORT):
            assert (output.finish_reason, output.text, output.token_ids) == (Finish.ERROR, "", [])
        assert llm.engine.idle
