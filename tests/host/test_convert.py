"""What `dlx convert` writes loads back equal: fused, merged and in fp8; it appears whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dlx import LLM, CapacityError, ConfigError, ModelError, SamplingParams, cli, convert, weights
from dlx.config import TINY
from dlx.models import family
from dlx.models.card import Card
from tests import families, gemma
from tests.adapters import write_adapter
from tests.checkpoints import ZOO, write

FAMILIES = ("dream", "llada", "llada2")  # biases; other names; experts


class Opened(NamedTuple):
    card: Card
    params: dict[str, Tensor]


def opened(folder: Path, lora: Path | None = None, dtype: torch.dtype = torch.float32) -> Opened:
    """A checkpoint's parameters, as the worker loads them."""
    raw, generation = weights.read_config(folder)
    card = Card.from_hf(raw, generation)
    kind = family(card.arch)
    places = kind.places(card)
    params = dict(kind.build(card, torch.device("cpu"), dtype).named_parameters())
    deltas = {} if lora is None else weights.Adapter.open(lora, places).deltas(places)
    weights.load(folder, weights.layout(raw, places, params), params, kind.stacked(card), kind.skipped, deltas=deltas)
    return Opened(card, params)


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: x for path in sorted(folder.glob("*.safetensors")) for name, x in load_file(path).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def qv(layers: int, E: int, q: int, v: int) -> dict[str, tuple[int, int]]:
    """The shapes of the q and v matrices in a Llama's names."""
    name = "model.layers.{}.self_attn.{}_proj"
    return {name.format(i, part): (n, E) for i in range(layers) for part, n in (("q", q), ("v", v))}


@pytest.fixture
def sdar(tmp_path: Path) -> Path:
    return write(tmp_path / "sdar", ZOO["b8"], seed=1, shards=2)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", qv(2, 96, 6 * 32, 2 * 32), seed=3)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000])
def test_a_fused_checkpoint_loads_back_equal(tmp_path: Path, name: str, shard_bytes: int) -> None:
    raw = families.write(tmp_path / "raw", name, families.network(name), stacked=shard_bytes == 20_000)
    out = convert.convert(raw, tmp_path / "out", shard_bytes=shard_bytes)
    before, after = opened(raw), opened(out)
    assert before.card == after.card
    assert same(before.params, after.params)
    held = stored(out)
    assert set(held) == set(before.params)
    assert all(torch.equal(held[name], before.params[name]) for name in held)
    shards = list(out.glob("model-*.safetensors"))
    assert len(shards) > 5 if shard_bytes == 20_000 else (out / weights.SINGLE).is_file()
    one = 64 * 97 * 4  # the largest parameter may stand alone
    assert all(path.stat().st_size < max(20_000, one, *(x.nbytes for x in held.values())) + 2_000 for path in shards)
    convert.convert(out, tmp_path / "again")
    assert same(stored(tmp_path / "again"), dict(sorted(held.items())))


@pytest.mark.parametrize("apart", [False, True], ids=["stacked experts", "experts one by one, the encoder's names"])
def test_a_fused_diffusion_gemma_loads_back_equal_without_its_vision_tower(tmp_path: Path, apart: bool) -> None:
    tensors = gemma.tensors(gemma.model())
    raw = gemma.write(tmp_path / "raw", gemma.apart(tensors) if apart else tensors)
    out = convert.convert(raw, tmp_path / "out")
    before, after = opened(raw), opened(out)
    assert before.card == after.card
    assert same(before.params, after.params)
    assert set(stored(out)) == set(before.params)
    with pytest.raises(ConfigError, match="fp8 is not there for diffusion_gemma"):
        convert.convert(raw, tmp_path / "small", fp8=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_file_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = write(tmp_path / "raw", ZOO["b8"], seed=1, dtype=dtype)
    out = convert.convert(raw, tmp_path / "out")
    assert {x.dtype for x in stored(out).values()} == {dtype}
    assert same(opened(raw, dtype=torch.bfloat16).params, opened(out, dtype=torch.bfloat16).params)


def test_a_converted_model_answers_as_the_original_does(sdar: Path, tmp_path: Path) -> None:
    out, answers = convert.convert(sdar, tmp_path / "out"), []
    for folder in (sdar, out):
        with LLM(folder, graphs="off", device="cpu", dtype="float32") as llm:
            answers.append(llm.generate([[9, 8, 7]], SamplingParams(max_tokens=24, ignore_eos=True))[0].token_ids)
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_checkpoint_loads_as_the_original_with_its_adapter(
    tmp_path: Path, adapter: Path, dtype: torch.dtype
) -> None:
    raw = write(tmp_path / "raw", ZOO["b8"], seed=1, dtype=dtype)
    out = convert.convert(raw, tmp_path / "out", lora=adapter)
    merged = opened(out, dtype=dtype).params
    assert same(merged, opened(raw, lora=adapter, dtype=dtype).params)
    plain = opened(raw, dtype=dtype).params
    changed = {name for name in plain if not torch.equal(plain[name], merged[name])}
    assert changed == {f"layers.{i}.attn.qkv.weight" for i in range(2)}
    fused = convert.convert(raw, tmp_path / "fused")
    assert same(merged, opened(fused, lora=adapter, dtype=dtype).params)  # onto the fused rows


@pytest.mark.parametrize("name", ["sdar", *FAMILIES])
def test_fp8_holds_each_row_of_a_matmul_by_its_largest_and_nothing_else(tmp_path: Path, sdar: Path, name: str) -> None:
    raw = sdar if name == "sdar" else families.write(tmp_path / "raw", name, families.network(name))
    out = convert.convert(raw, tmp_path / "out", fp8=True)
    before, held = opened(raw).params, stored(out)
    small = {name for name, x in held.items() if x.dtype == weights.FP8}
    kinds = {name.split(".", 2)[-1] for name in small}
    dense = {"attn.qkv.weight", "attn.out.weight", "mlp.gate_up.weight", "mlp.down.weight"}
    assert kinds == dense | ({"mlp.gate_up", "mlp.down"} if name == "llada2" else set())
    for param, x in before.items():
        if param not in small:
            assert torch.equal(held[param], x)
            continue
        scale = held[f"{param.removesuffix('.weight')}.scale" if param.endswith(".weight") else f"{param}_scale"]
        assert scale.dtype == torch.float32
        for got, by, row in zip(held[param].flatten(0, -2), scale.flatten(), x.flatten(0, -2), strict=True):
            assert by == row.abs().max() / 448
            assert torch.equal(got.float(), (row / by).to(weights.FP8).float())
            torch.testing.assert_close(got.float() * by, row, rtol=2**-4, atol=float(by) * 2**-9)
    assert len(held) == len(before) + len(small)


def test_an_fp8_checkpoint_says_so_and_loads_into_fp8_parameters(sdar: Path, tmp_path: Path) -> None:
    out = convert.convert(sdar, tmp_path / "out", fp8=True)
    raw, generation = weights.read_config(out)
    assert raw["quantization_config"] == {"quant_method": "dlx_fp8"}
    assert Card.from_hf(raw, generation).fp8
    held = stored(out)
    params = {name: torch.zeros_like(x) for name, x in held.items()}
    weights.load(out, weights.layout(raw, {}, params), params)
    assert same({n: x.float() for n, x in params.items()}, {n: x.float() for n, x in held.items()})
    with pytest.raises(ModelError, match="is in fp8 already"):
        convert.convert(out, tmp_path / "again", fp8=True)


MIXED = {"model.layers.1.attention.dense": (64, 128), "model.layers.2.mlp.experts.3.down_proj": (64, 24)}


def held(folder: Path, **how: Any) -> dict[str, Tensor]:
    """What an LLM of a checkpoint holds, in fp32."""
    with LLM(folder, graphs="off", device="cpu", dtype="float32", **how) as llm:
        return {name: x.float() for name, x in llm.engine.worker.net.named_parameters()}


@pytest.mark.parametrize("name", ["sdar", "llada", "llada2"])
def test_an_fp8_checkpoint_with_an_adapter_merged_loads_as_the_original_quantised_and_merged(
    sdar: Path, adapter: Path, tmp_path: Path, name: str
) -> None:
    raw = sdar
    if name != "sdar":
        raw = families.write(tmp_path / name, name, families.network(name))
        modules = {"llada": {"model.transformer.blocks.1.q_proj": (64, 64)}, "llada2": MIXED}
        adapter = write_adapter(tmp_path / "other", modules[name], seed=4)
    out = convert.convert(raw, tmp_path / "out", lora=adapter, fp8=True)
    converted, merged, plain = held(out), held(raw, lora=adapter, quantization="fp8"), held(raw, quantization="fp8")
    assert same(converted, merged)
    changed = {param for param in plain if not torch.equal(plain[param], merged[param])}
    assert len(changed) >= 2  # weights, and scales if a row's largest number is another


def test_weights_quantised_while_they_are_read_are_those_of_the_converted_checkpoint(
    nano: Path, tmp_path: Path
) -> None:
    out = convert.convert(nano, tmp_path / "out", fp8=True)
    with LLM(out) as stored, LLM(nano, quantization="fp8") as quantised:
        assert quantised.card.fp8 and stored.card.fp8
        params = [dict(llm.engine.worker.net.named_parameters()) for llm in (stored, quantised)]
        assert same(*({name: x.float() for name, x in of.items()} for of in params))
        assert params[0]["layers.0.attn.qkv.weight"].dtype == weights.FP8
        answers = [llm.generate(["12 + 7 ="], SamplingParams(max_tokens=16))[0] for llm in (stored, quantised)]
    assert answers[0].token_ids == answers[1].token_ids


def test_dummy_weights_in_fp8_are_as_large_as_others(nano: Path) -> None:
    with LLM(nano, load_format="dummy", quantization="fp8") as llm:
        linear = llm.engine.worker.net.layers[0].attn.qkv
        assert (linear.weight.float() * linear.scale[:, None]).std() == pytest.approx(0.02, rel=0.05)


def test_a_row_of_zeros_has_the_scale_one() -> None:
    small, scale = convert.quantised(torch.tensor([[0.0, 0.0], [-896.0, 2.0]]))
    assert scale.tolist() == [1.0, 2.0]
    assert small.float().tolist() == [[0.0, 0.0], [-448.0, 1.0]]


def test_a_foreign_quantisation_is_refused(sdar: Path) -> None:
    path = sdar / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ModelError, match=r"quantization_config=.* is not allowed"):
        opened(sdar)


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, CapacityError), (errno.EACCES, ConfigError)], ids=["full", "forbidden"]
)
def test_a_conversion_that_fails_leaves_nothing_behind(
    sdar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    def fail(tensors: dict[str, Tensor], path: Path, *rest: object) -> None:
        if path.name == "1.safetensors":
            raise OSError(number, os.strerror(number))
        save_file(tensors, path)

    monkeypatch.setattr(convert, "save_file", fail)
    with pytest.raises(kind, match=os.strerror(number)):
        convert.convert(sdar, tmp_path / "new" / "out", shard_bytes=20_000)
    assert list((tmp_path / "new").iterdir()) == []


def test_what_is_there_is_not_overwritten(sdar: Path) -> None:
    before = sorted(sdar.iterdir())
    with pytest.raises(ConfigError, match="is there already"):
        convert.convert(sdar, sdar)
    assert sorted(sdar.iterdir()) == before


def test_the_command_converts_and_prints_the_folder(
    sdar: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["convert", str(sdar), str(out), "--lora", str(adapter), "--shard-gb", "0.001"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert same(opened(out).params, opened(sdar, lora=adapter).params)
    assert (out / "tokenizer.json").read_bytes() == (sdar / "tokenizer.json").read_bytes()
    assert cli.main(["convert", str(sdar), str(out)]) == 2
    assert cli.main(["convert", str(sdar), str(out), "--shard-gb", "0"]) == 2
    assert cli.main(["convert", str(tmp_path / "gone"), str(tmp_path / "new")]) == 3


def test_the_command_lists_every_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["family", "architecture", "policy", "block", "status", "checkpoints"]
    assert any(line.startswith("sdar ") and "JetLM/SDAR-{1.7B,4B,8B}-Chat" in line for line in lines)
    assert cli.main(["models", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["architecture"] for row in rows} >= {"SDARForCausalLM", "DreamModel", "LLaDA2MoeModelLM"}
    assert {row["family"] for row in rows if "trained" in row["status"]} == {opened(TINY).card.family}
    assert all(row["status"].startswith("decodes; checked with ") for row in rows)
