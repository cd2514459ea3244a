"""LoRA: merged, chosen row by row at run time, and PEFT's own forward are the same; what dlx cannot do is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dlx import LLM, ConfigError, ModelError, RequestError, SamplingParams, weights
from dlx.models import decoder, family
from dlx.models.card import Card
from dlx.models.decoder import Decoder
from dlx.models.layers import Linear
from dlx.ops.attention import View
from dlx.weights import adapter as adapter_files
from tests.adapters import write_adapter
from tests.checkpoints import ZOO, write
from tests.families import FAMILIES, RENAMED, VOCAB, logits, mask, network
from tests.families import write as write_family

T = 16
NAMES = ("sdar", "dream", "llada", "sdar_moe")  # norms of heads; biases; other names; experts beside
SOME: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
MOST: dict[str, Any] = {
    "r": 6, "lora_alpha": 3, "use_rslora": True,
    "target_modules": r".*\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
    "rank_pattern": {"o_proj": 2, r"layers\.1\..*v_proj": 7}, "alpha_pattern": {"k_proj": 5},
}  # fmt: skip


class Tuned(NamedTuple):
    """A checkpoint, two adapters of it, and what transformers and PEFT say: without one, with the first, the second."""

    name: str
    folder: Path
    adapters: tuple[Path, Path]
    ids: Tensor
    theirs: tuple[Tensor, Tensor, Tensor]


def trained(
    name: str, net: Any, config: dict[str, Any], folder: Path, seed: int, said: Callable[[Any], Tensor]
) -> Tensor:
    """Draw and save an adapter with PEFT, under the family's names → what the network with it says."""
    from peft import LoraConfig, get_peft_model

    if name == "sdar_moe" and isinstance(config["target_modules"], str):
        config = config | {"target_modules": r".*\.self_attn\.[qkvo]_proj"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT and of what it imports
        model = get_peft_model(net, LoraConfig(task_type="CAUSAL_LM", **config))
        gen = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, x in model.named_parameters():
                if "lora_" in key:
                    x.copy_(torch.randn(x.shape, generator=gen) / x.shape[1] ** 0.5)
        model.save_pretrained(folder)
        out = said(model)
        model.unload()
    path = folder / adapter_files.WEIGHTS
    rename = RENAMED.get(FAMILIES[name].published, dict)
    renamed: dict[str, Tensor] = {}
    for key, x in load_file(path).items():
        found = adapter_files.NAME.fullmatch(key)
        assert found is not None
        (base,) = rename({f"{found[1]}.weight": x})
        renamed[f"base_model.model.{base.removesuffix('.weight')}.lora_{found[2]}.default.weight"] = x
    save_file(renamed, path)
    if name == "llada":
        facts = json.loads((folder / "adapter_config.json").read_text())
        patterns = ["rank_pattern", "alpha_pattern"]
        swap = {"o_proj": "attn_out", r"layers\.1\..*v_proj": r"blocks\.1\.v_proj"}
        facts |= {key: {swap.get(k, k): v for k, v in facts[key].items()} for key in patterns}
        if isinstance(facts["target_modules"], str):
            facts["target_modules"] = ["q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"]
        (folder / "adapter_config.json").write_text(json.dumps(facts))
    return out


@pytest.fixture(scope="module", params=NAMES)
def tuned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    name, top = request.param, tmp_path_factory.mktemp("lora")
    net = network(name)
    folder = write_family(top / "base", name, net)
    ids = torch.randint(4, VOCAB, (T,), generator=torch.Generator().manual_seed(5), dtype=torch.int32)

    def said(model: Any) -> Tensor:
        return logits(model, ids, mask(T, FAMILIES[name].L, None))

    plain = said(net)
    with_adapters = [trained(name, net, config, top / f"adapter{i}", i, said) for i, config in enumerate((SOME, MOST))]
    return Tuned(name, folder, (top / "adapter0", top / "adapter1"), ids, (plain, *with_adapters))


def opened(tuned: Tuned, lora: Path | None = None, adapters: tuple[Path, ...] = ()) -> tuple[Card, Decoder]:
    card = Card.from_hf(*weights.read_config(tuned.folder))
    kind = family(card.arch)
    places = kind.places(card)
    net = kind.build(card, torch.device("cpu"), torch.float32)
    deltas = {} if lora is None else weights.Adapter.open(lora, places).deltas(places)
    weights.load(tuned.folder, places, dict(net.named_parameters()), deltas=deltas)
    weights.install(net, [weights.Adapter.open(path, places) for path in adapters], places)
    return card, net


@torch.no_grad()
def says(card: Card, net: Decoder, tuned: Tuned, slots: list[int] | None = None) -> Tensor:
    """The ids in as many rows as there are slots, in one forward → [B, T, V]."""
    B, L = len(slots or [0]), FAMILIES[tuned.name].L
    kv = tuple(torch.zeros(2, B * T // L, L, card.kv_heads, card.head_dim) for _ in range(card.layers))
    pages = torch.arange(B * T // L, dtype=torch.int32).view(B, -1)
    pos = torch.arange(T, dtype=torch.int32).expand(B, T).contiguous()
    lora = None if slots is None else torch.tensor(slots, dtype=torch.int32)
    h = net(net.embed(tuned.ids.expand(B, T)), View(pos, pages, (pos // L + 1) * L, lora=lora), kv)
    return h @ net.head().T


def error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.fixture(params=["narrow", "wide"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways through the decoder."""
    if request.param == "wide":
        monkeypatch.setattr(decoder, "MOST_ROWS", 0)
    return request.param


@pytest.mark.parametrize("which", [0, 1])
def test_a_merged_adapter_gives_pefts_logits(tuned: Tuned, path: str, which: int) -> None:
    card, net = opened(tuned, lora=tuned.adapters[which])
    assert error(says(card, net, tuned)[0], tuned.theirs[1 + which]) < 1e-5
    assert error(says(card, net, tuned)[0], tuned.theirs[0]) > 1e-2


def test_rows_of_one_batch_give_pefts_logits_each_with_its_own_adapter(tuned: Tuned, path: str) -> None:
    card, net = opened(tuned, adapters=tuned.adapters)
    ours = says(card, net, tuned, [2, 0, 1])
    for row, slot in enumerate((2, 0, 1)):
        assert error(ours[row], tuned.theirs[slot]) < 1e-5
        assert error(ours[row], tuned.theirs[slot - 1]) > 1e-2
        assert error(says(card, net, tuned, [slot])[0], ours[row]) < 1e-5


def test_a_row_without_an_adapter_is_the_plain_network_bit_for_bit_where_nothing_is_fused(
    tuned: Tuned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "MOST_ROWS", 0)
    plain, adapted = opened(tuned), opened(tuned, adapters=tuned.adapters)
    assert torch.equal(says(*plain, tuned, [0]), says(*adapted, tuned, [0]))


def test_without_adapters_no_layer_has_any_and_a_network_with_them_asks_whose_rows_it_computes(tuned: Tuned) -> None:
    _, plain = opened(tuned)
    assert all(layer.adapters is None for layer in plain.modules() if isinstance(layer, Linear))
    card, adapted = opened(tuned, adapters=tuned.adapters)
    with pytest.raises(AssertionError, match="must be told whose rows"):
        says(card, adapted, tuned)


@pytest.mark.parametrize("stacked", [False, True], ids=["experts one by one", "stacked experts"])
def test_an_adapter_of_an_expert_changes_that_expert_alone(tmp_path: Path, stacked: bool) -> None:
    folder = write_family(tmp_path / "base", "llada2", network("llada2"), stacked)
    module = "model.layers.2.mlp.experts.3.up_proj"
    adapter = write_adapter(tmp_path / "adapter", {module: (24, 64)}, seed=2)
    factors = load_file(adapter / adapter_files.WEIGHTS)
    b, a = (factors[f"base_model.model.{module}.lora_{x}.weight"] for x in "BA")
    with llm(folder) as plain, llm(folder, lora=adapter) as merged:
        before, after = (dict(x.engine.worker.net.named_parameters()) for x in (plain, merged))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"layers.2.mlp.gate_up"}
    added = after["layers.2.mlp.gate_up"] - before["layers.2.mlp.gate_up"]
    torch.testing.assert_close(added[3, 24:], 6 / 4 * b @ a, rtol=1e-5, atol=1e-6)
    added[3, 24:] = 0
    assert not added.any()


# the engine, on a checkpoint that decodes
SHAPE = ZOO["b8"]
HF = {"q": (192, 96), "k": (64, 96), "v": (64, 96), "o": (96, 192)}
ALL = {f"model.layers.{i}.self_attn.{part}_proj": shape for i in range(2) for part, shape in HF.items()}
ALL |= {f"model.layers.{i}.mlp.{part}_proj": (160, 96) for i in range(2) for part in ("gate", "up")}
ALL |= {f"model.layers.{i}.mlp.down_proj": (96, 160) for i in range(2)}
PROMPTS = [[9, 8, 7, 6, 5, 4, 11, 12, 13, 14, 15], list(range(20, 60)), [30], [9, 8, 7, 6, 5, 4, 11, 12, 13, 14, 15]]
ASK = SamplingParams(max_tokens=40, ignore_eos=True)


class Base(NamedTuple):
    folder: Path
    adapters: dict[str, Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    top = tmp_path_factory.mktemp("engine")
    one = write_adapter(top / "one", ALL, seed=1)
    two = write_adapter(top / "two", {k: v for k, v in ALL.items() if "q_proj" in k or "up" in k}, 2, r=3, lora_alpha=9)
    return Base(write(top / "base", SHAPE, seed=1), {"one": one, "two": two})


def llm(folder: Path, **more: Any) -> LLM:
    return LLM(folder, **({"graphs": "off", "device": "cpu", "dtype": "float32"} | more))


def answers(llm: LLM, names: list[str | None], prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    return [output.token_ids for output in llm.generate(prompts, ASK, lora=names)]


@pytest.mark.parametrize("policy", ["single_bd", "multi_bd"])  # multi_bd with 8 rows is packed
def test_requests_of_one_batch_answer_as_alone_and_as_with_merged_weights(base: Base, policy: str) -> None:
    names = ["one", "two", None, None]
    with llm(base.folder, adapters=base.adapters, policy=policy) as engine:
        together = answers(engine, [*names, *reversed(names)], PROMPTS * 2)
        alone = [answers(engine, [name], [prompt])[0] for name, prompt in zip(names, PROMPTS)]
    assert together[:4] == alone
    assert together[4:] != together[:4]
    for at, name in enumerate(names):
        with llm(base.folder, lora=base.adapters.get(name or ""), policy=policy) as merged:
            assert merged.generate(PROMPTS[at], ASK)[0].token_ids == alone[at]
    assert alone[0] != alone[3]  # the same prompt, with an adapter and without


def test_a_stream_takes_an_adapter_and_a_slot_forgets_it(base: Base) -> None:
    with llm(base.folder, adapters=base.adapters, max_num_seqs=1) as engine:
        plain, one, again = (answers(engine, [name], PROMPTS[:1])[0] for name in (None, "one", None))
        streamed = [tok for chunk in engine.stream(PROMPTS[0], ASK, lora="one") for tok in chunk.token_ids]
    assert plain == again != one == streamed


@pytest.mark.long
def test_the_compiled_step_takes_adapters_as_the_eager_one_does(base: Base) -> None:
    with (
        llm(base.folder, adapters=base.adapters) as eager,
        llm(base.folder, adapters=base.adapters, graphs="compile") as fast,
    ):
        assert answers(eager, ["one", "two", None, "two"]) == answers(fast, ["one", "two", None, "two"])


def test_an_adapter_that_the_engine_has_not_is_refused_with_those_that_it_has(base: Base) -> None:
    with llm(base.folder, adapters=base.adapters) as engine:
        with pytest.raises(RequestError, match=r"adapter='three' is not one that .* \(one, two\)"):
            engine.generate(PROMPTS, ASK, lora="three")
        with pytest.raises(RequestError, match="2 adapters for 4 prompts"):
            engine.generate(PROMPTS, ASK, lora=["one", "two"])
        assert engine.engine.idle
    with llm(base.folder) as engine, pytest.raises(RequestError, match=r"build it with adapters="):
        engine.generate(PROMPTS, ASK, lora="one")
    with pytest.raises(ConfigError, match="random weights"):
        llm(base.folder, lora=base.adapters["one"], load_format="dummy")


def facts(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def tensors(edit: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        held = load_file(path)
        edit(held)
        save_file(held, path)

    return damage


def truncated(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def linked(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.rename(folder.parent / "elsewhere.safetensors")
    path.symlink_to(folder.parent / "elsewhere.safetensors")


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Q = "base_model.model.model.layers.0.self_attn.q_proj"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "a target that matches nothing": (facts(target_modules=[*TARGETS, "c_attn"]), r"target_modules has c_attn"),
    "a matrix that no target names": (facts(target_modules=TARGETS[1:]), "target_modules has nothing for .*q_proj"),
    "no targets": (facts(target_modules=[]), r"target_modules has nothing for model\.layers\.0\.mlp\.down_proj, "),
    "dora": (facts(use_dora=True), "use_dora=True is not supported"),
    "bias": (facts(bias="lora_only"), "bias='lora_only' is not supported"),
    "saved modules": (facts(modules_to_save=["lm_head"]), "modules_to_save="),
    "transposed": (facts(fan_in_fan_out=True), "fan_in_fan_out=True"),
    "pissa": (facts(init_lora_weights="pissa_niter_4"), "changed the base weights"),
    "not LoRA": (facts(peft_type="IA3"), "peft_type='IA3'"),
    "no rank": (facts(r=None), "r=None is not allowed"),
    "another rank": (facts(r=5), r"q_proj: lora_A has shape \[4, 96\], expected \[5, 96\]"),
    "another width": (
        tensors(lambda x: x.update({f"{Q}.lora_A.weight": torch.ones(4, 64)})),
        r"layers\.0\.self_attn\.q_proj: lora_A has shape \[4, 64\], expected \[4, 96\]",
    ),
    "another model's names": (
        tensors(lambda x: x.update({"base_model.model.h.0.c_attn.lora_A.weight": torch.ones(4, 96)})),
        r"h\.0\.c_attn: the model has no such matrix",
    ),
    "a missing factor": (tensors(lambda x: x.pop(f"{Q}.lora_B.weight")), r"q_proj: lora_B is missing"),
    "an embedding's factor": (
        tensors(lambda x: x.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 96)})),
        r"lora_embedding_A is no factor of a linear layer",
    ),
    "integers": (
        tensors(lambda x: x.update({f"{Q}.lora_A.weight": torch.ones(4, 96, dtype=torch.int8)})), "has dtype I8"
    ),
    "truncated": (truncated, "is truncated"),
    "a link out of the folder": (linked, "outside of its folder"),
    "half a rank": (facts(r=4.5), r"r=4\.5 is not allowed; expected an integer"),
    "no patterns": (facts(rank_pattern="q_proj"), "rank_pattern='q_proj' is not allowed"),
    "a factor twice": (
        tensors(lambda x: x.update({f"{Q}.lora_A.default.weight": torch.ones(4, 96)})), r"lora_A of .*q_proj is twice"
    ),
    "a name of two lines": (tensors(lambda x: x.update({"a\nb": torch.ones(1)})), r"'a\\nb' is no name of a tensor"),
    "NaN": (tensors(lambda x: x[f"{Q}.lora_B.weight"].fill_(torch.nan)), r"q_proj holds NaN or infinite values"),
    "a pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), r"adapter_model\.bin may run code"
    ),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("way", ["merged", "at run time"])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_adapter_is_refused_in_one_line_that_names_the_file(
    base: Base, tmp_path: Path, name: str, way: str
) -> None:
    damage, words = BAD[name]
    folder = write_adapter(tmp_path / "adapter", ALL)
    damage(folder)
    how: dict[str, Any] = {"lora": folder} if way == "merged" else {"adapters": {"bad": folder}}
    with pytest.raises(ModelError, match=words) as caught:
        llm(base.folder, check_weights=True, **how)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_head_can_be_adapted_only_before_it_is_loaded(tmp_path: Path) -> None:
    folder = write(tmp_path / "base", ZOO["b4"], seed=0)
    adapter = write_adapter(tmp_path / "adapter", {"lm_head": (320, 64)})
    llm(folder, lora=adapter).close()
    with pytest.raises(ModelError, match="adapts lm_head, which only merged adapters can"):
        llm(folder, adapters={"head": adapter})
