"""DiffusionGemma in dlx says what transformers' does: both passes, layouts on disk, generate token for token."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSampler

from dlx import LLM, SamplingParams
from dlx.errors import ConfigError, ModelError, PolicyError
from dlx.graphs.canvas import noise
from dlx.graphs.policies import POLICIES, Policy
from dlx.graphs.rules import Canvas, Stable
from dlx.models import family
from dlx.models.card import Card
from dlx.models.gemma.network import DiffusionGemma
from dlx.ops.attention import View
from dlx.weights import load, read_config
from tests import gemma
from tests.adapters import write_adapter
from tests.draws import Draws, philox
from tests.gemma import CANVAS, STOP, VOCAB

DATA = Path(__file__).parents[1] / "data"
QUICK: dict[str, Any] = {"max_denoising_steps": 12, "t_min": 0.02, "t_max": 0.05, "confidence_threshold": 0.5}
QUICK_POLICY = replace(POLICIES["diffusion_gemma"], canvas=Canvas(steps=12, hot=0.05, cold=0.02), settle=Stable(1, 0.5))


@pytest.fixture(scope="module")
def theirs() -> DiffusionGemmaForBlockDiffusion:
    return gemma.model()


@pytest.fixture(scope="module")
def folder(theirs: DiffusionGemmaForBlockDiffusion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as published."""
    return gemma.write(tmp_path_factory.mktemp("gemma"), gemma.tensors(theirs))


class Ours(NamedTuple):
    """dlx's network with empty pages for one row."""

    net: DiffusionGemma
    kv: tuple[Tensor, ...]
    pages: Tensor

    def encode(self, ids: Tensor, first: int = 0) -> Tensor:
        """Ids [T] at positions `first` on, as a part of the prefix → hidden [T, E]."""
        pos = torch.arange(first, first + len(ids), dtype=torch.int32)[None]
        return self.net(self.net.embed(ids[None].int()), View(pos, self.pages, pos + 1), self.kv)[0]

    def decode(self, canvas: Tensor, first: int, soft: Tensor | None, conditioned: bool = True) -> Tensor:
        """A canvas [L] behind `first` positions → logits [L, V]."""
        x = self.net.embed(canvas[None].int())
        if conditioned:
            x = self.net.condition(x, torch.zeros_like(x) if soft is None else soft)
        pos = torch.arange(first, first + len(canvas), dtype=torch.int32)[None]
        seen = torch.full_like(pos, first + len(canvas))
        h = self.net(x, View(pos, self.pages, seen, encode=torch.tensor([False])), self.kv)
        return (30 * torch.tanh(h @ self.net.head().T / 30))[0]

    def soft(self, logits: Tensor) -> Tensor:
        """[L, V] → [1, L, E]: what these distributions expect to be embedded."""
        return (logits.softmax(-1) @ self.net.table * self.net.scale)[None]


def opened(folder: Path) -> Ours:
    card = Card.from_hf(*read_config(folder))
    made = family(card.arch)
    net = made.build(card, torch.device("cpu"), torch.float32)
    assert isinstance(net, DiffusionGemma)
    load(folder, made.places(card), dict(net.named_parameters()), made.stacked(card), made.skipped)
    kv = tuple(torch.zeros(2, 12, 4, G, D) for G, D in card.kv)
    return Ours(net, kv, torch.randperm(12, generator=torch.Generator().manual_seed(9)).int()[None])


def ids(n: int, seed: int) -> Tensor:
    return torch.randint(6, VOCAB - 3, (n,), generator=torch.Generator().manual_seed(seed))


def error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def transformers_dialect(net: DiffusionGemmaForBlockDiffusion) -> dict[str, Any]:
    """config.json as transformers 5 writes it: `per_layer_config`, and the vision tower's facts."""
    config = json.loads(net.config.to_json_string(use_diff=False))
    assert "per_layer_config" in config["text_config"] and "global_head_dim" not in config["text_config"]
    return config | {"architectures": ["DiffusionGemmaForBlockDiffusion"]}


@pytest.mark.parametrize("layout", ["published", "transformers 5", "encoder's names, experts one by one"])
@pytest.mark.parametrize("n", [3, 17], ids=["a prefix within the window", "a prefix beyond the window"])
@torch.no_grad()
def test_both_passes_give_transformers_values(
    theirs: DiffusionGemmaForBlockDiffusion, folder: Path, tmp_path: Path, layout: str, n: int
) -> None:
    if layout == "transformers 5":
        gemma.write(folder := tmp_path, gemma.tensors(theirs), transformers_dialect(theirs))
    elif layout != "published":
        gemma.write(folder := tmp_path, gemma.apart(gemma.tensors(theirs)))
    ours, prompt, canvas = opened(folder), ids(n, n), torch.randint(0, VOCAB, (CANVAS,))
    before = 3 * torch.randn(CANVAS, VOCAB, generator=torch.Generator().manual_seed(n))
    assert error(ours.encode(prompt), theirs.model.encoder(input_ids=prompt[None]).last_hidden_state[0]) < 1e-5
    asked = {"input_ids": prompt[None], "decoder_input_ids": canvas[None]}
    assert error(ours.decode(canvas, n, None), theirs(**asked).logits[0]) < 1e-5
    given = theirs(**asked, self_conditioning_logits=before[None]).logits[0]
    assert error(ours.decode(canvas, n, ours.soft(before)), given) < 1e-5
    assert error(ours.decode(canvas, n, None), given) > 1e-3


@torch.no_grad()
def test_a_prefix_encoded_canvas_by_canvas_over_what_decoding_left_gives_the_same(
    theirs: DiffusionGemmaForBlockDiffusion, folder: Path
) -> None:
    ours, tokens = opened(folder), ids(5 + 3 * CANVAS, 1)
    ours.encode(tokens[:5])
    for at in range(5, len(tokens), CANVAS):
        canvas = torch.randint(0, VOCAB, (CANVAS,), generator=torch.Generator().manual_seed(at))
        expected = theirs(input_ids=tokens[None, :at], decoder_input_ids=canvas[None]).logits[0]
        assert error(ours.decode(canvas, at, None), expected) < 1e-5
        ours.encode(tokens[at : at + CANVAS], at)


@torch.no_grad()
def test_rows_that_encode_and_rows_that_decode_share_a_forward(folder: Path) -> None:
    ours, prompt, tokens = opened(folder), ids(9, 2), ids(CANVAS, 3)
    pos = torch.arange(9, 9 + CANVAS, dtype=torch.int32).repeat(2, 1)
    ours.encode(prompt)
    other = torch.tensor([[5, 4, 3, 2, 1, 0]], dtype=torch.int32)
    pages = torch.cat((ours.pages[:, :6], ours.pages[:, other[0] + 6]))
    ours._replace(pages=pages[1:]).encode(prompt)
    encode = torch.tensor([True, False])
    x = torch.cat((ours.net.embed(tokens[None]), ours.net.condition(ours.net.embed(tokens[None]), torch.zeros(1))))
    seen = torch.where(encode[:, None], pos + 1, 9 + CANVAS).int()
    both = ours.net(x, View(pos, pages, seen, encode=encode), ours.kv)
    torch.testing.assert_close(both[0], ours.encode(tokens, 9), rtol=1e-5, atol=1e-5)
    logits = (30 * torch.tanh(both[1] @ ours.net.head().T / 30)).clone()
    torch.testing.assert_close(logits, ours._replace(pages=pages[1:]).decode(tokens, 9, None), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrong", ["one scalar for both roles", "a window too wide", "no norm of the canvas' input"])
@torch.no_grad()
def test_what_others_got_wrong_does_not_give_transformers_logits(
    theirs: DiffusionGemmaForBlockDiffusion, folder: Path, wrong: str
) -> None:
    ours, prompt, canvas = opened(folder), ids(17, 4), ids(CANVAS, 5)
    expected = theirs(input_ids=prompt[None], decoder_input_ids=canvas[None]).logits[0]
    ours.encode(prompt)
    if wrong == "one scalar for both roles":
        for layer in ours.net.layers:
            layer.scalars[1] = layer.scalars[0]
    elif wrong == "a window too wide":
        ours.net.window += 1
    assert error(ours.decode(canvas, 17, None, conditioned="no norm" not in wrong), expected) > 1e-3


def open_llm(folder: Path, policy: str | Policy = "diffusion_gemma", **config: Any) -> LLM:
    cold = {"prefix_caching": False}  # so that prefills are counted alike
    return LLM(folder, policy=policy, graphs="off", device="cpu", dtype="float32", **cold | config)


class Case(NamedTuple):
    """A sharp network, so that canvases settle early, with its LLM."""

    net: DiffusionGemmaForBlockDiffusion
    llm: LLM


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    net = gemma.model(seed=3, sharpness=6.0)
    folder = gemma.write(tmp_path_factory.mktemp("sharp"), gemma.tensors(net))
    with open_llm(folder, QUICK_POLICY, max_num_seqs=4) as llm:
        yield Case(net, llm)


def generated(
    net: DiffusionGemmaForBlockDiffusion, prompt: list[int], n: int, seed: int, **how: Any
) -> tuple[Any, Draws]:
    """transformers' own generate under dlx's draws → its output, and how they were drawn."""
    draws = Draws(seed, len(prompt), CANVAS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint", draws.randint)
        patch.setattr(torch, "multinomial", draws.multinomial)
        how = {"eos_token_id": [STOP], "pad_token_id": 0} | how
        return net.generate(input_ids=torch.tensor([prompt]), max_new_tokens=n, **how), draws


def before_stop(answer: list[int]) -> list[int]:
    return answer[: answer.index(STOP)] if STOP in answer else answer


@pytest.mark.parametrize("n", [3, 17])
def test_generate_equals_transformers_token_for_token_at_the_defaults(
    theirs: DiffusionGemmaForBlockDiffusion, folder: Path, n: int
) -> None:
    prompt = ids(n, n).tolist()
    expected, draws = generated(theirs, prompt, 2 * CANVAS, seed=7)
    with LLM(folder, graphs="off", device="cpu", dtype="float32") as llm:  # the family's policy
        (out,) = llm.generate(prompt, SamplingParams(max_tokens=2 * CANVAS, temperature=1.0, seed=7))
    answer = expected.sequences[0, n:].tolist()
    assert out.token_ids == before_stop(answer)
    assert (out.nfe, out.prefill_forwards) == (draws.forwards, len(answer) // CANVAS)


@pytest.mark.parametrize("seed", [1, 2**40 + 5])
@pytest.mark.parametrize("n", [1, 8, 21])
def test_generate_equals_transformers_where_canvases_settle_early(quick: Case, n: int, seed: int) -> None:
    prompt, length = ids(n, n).tolist(), 4 * CANVAS - 3
    expected, draws = generated(quick.net, prompt, length, seed, **QUICK)
    (out,) = quick.llm.generate(prompt, SamplingParams(max_tokens=length, temperature=1.0, seed=seed))
    answer = expected.sequences[0, n : n + length].tolist()
    assert out.token_ids == before_stop(answer)
    assert (out.nfe, out.finish_reason) == (draws.forwards, "stop" if STOP in answer else "length")
    assert draws.forwards < 12 * -(-out.tokens // CANVAS)


def accepted(patch: pytest.MonkeyPatch) -> list[list[int]]:
    """A list to which transformers' generate adds what each forward accepts of a canvas, −1 where nothing."""
    told, real = list[list[int]](), EntropyBoundSampler.accept_canvas

    def accept(self: EntropyBoundSampler, current: Tensor, denoised: Tensor, *rest: Any, **more: Any) -> Tensor:
        out = real(self, current, denoised, *rest, **more)
        told.append(torch.where(self.accepted_token_mask, denoised, -1)[0].tolist())
        return out

    patch.setattr(EntropyBoundSampler, "accept_canvas", accept)
    return told


@pytest.mark.parametrize("n", [2, pytest.param(50, marks=pytest.mark.long)])
def test_prompts_are_decoded_forward_for_forward_as_transformers_decodes_them(
    n: int, quick: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, length, refused = accepted(monkeypatch), 2 * CANVAS - 1, 0
    warm = replace(QUICK_POLICY, canvas=Canvas(steps=12, hot=0.4, cold=0.2))  # so that a forward refuses some
    with open_llm(gemma.write(tmp_path, gemma.tensors(quick.net)), warm, max_num_seqs=1) as llm:
        for seed in range(n):
            prompt = ids(1 + seed % 23, seed).tolist()
            told.clear()
            expected, draws = generated(quick.net, prompt, length, seed, **QUICK | {"t_min": 0.2, "t_max": 0.4})
            params = SamplingParams(max_tokens=length, temperature=1.0, seed=seed)
            chunks, out = list(llm.stream(prompt, params, watch=True)), list[int]()
            for chunk in chunks:
                out += chunk.token_ids
            answer = expected.sequences[0, len(prompt) : len(prompt) + length].tolist()
            assert (out, chunks[-1].nfe) == (before_stop(answer), draws.forwards), seed
            spent = [0, *(chunk.nfe for chunk in chunks)]
            decoding = [chunk for chunk, (a, b) in zip(chunks, itertools.pairwise(spent)) if b > a]
            assert len(decoding) == len(told) == draws.forwards
            watched = [(chunk.window, theirs) for chunk, theirs in zip(decoding, told) if chunk.window]
            assert len(watched) >= len(told) - 2  # of two canvases: a decided one has left the window
            assert all(ours == theirs for ours, theirs in watched), (seed, watched)
            refused += sum(theirs.count(-1) for theirs in told)
    assert refused > 5 * n


def test_generate_stops_where_transformers_stops(quick: Case) -> None:
    prompt = ids(13, 6).tolist()
    whole, _ = generated(quick.net, prompt, 4 * CANVAS, 11, **QUICK)
    answer = whole.sequences[0, 13:].tolist()
    stop = next(tok for tok in answer[CANVAS + 1 :] if answer.index(tok) > CANVAS)
    expected, draws = generated(
        quick.net, prompt, 4 * CANVAS, 11, **QUICK, eos_token_id=[STOP, stop], pad_token_id=VOCAB
    )
    params = SamplingParams(4 * CANVAS, temperature=1.0, seed=11, stop_token_ids=(stop,))
    (out,) = quick.llm.generate(prompt, params)
    kept = [tok for tok in expected.sequences[0, 13:].tolist() if tok != VOCAB]
    assert ([*out.token_ids, stop], out.finish_reason) == (kept, "stop")
    assert (out.nfe, out.tokens_per_forward) == (draws.forwards, pytest.approx(float(expected.tokens_per_forward[0])))


def test_an_answer_is_the_same_alone_in_a_batch_and_in_launches_of_several_forwards(
    quick: Case, tmp_path: Path
) -> None:
    prompts = [ids(n, n).tolist() for n in (2, 9, 30, 5, 16)]
    params = [SamplingParams(2 * CANVAS + 3, temperature=t, seed=i) for i, t in enumerate((1.0, 0.5, 0.0, 1.0, 2.0))]
    alone = [quick.llm.generate(p, q)[0] for p, q in zip(prompts, params, strict=True)]
    together = quick.llm.generate(prompts, params)
    with open_llm(gemma.write(tmp_path, gemma.tensors(quick.net)), QUICK_POLICY, max_num_seqs=2, forwards=9) as llm:
        looped = llm.generate(prompts, params)
    for outs in (together, looped):
        assert [(o.token_ids, o.nfe, o.prefill_forwards) for o in outs] == [
            (o.token_ids, o.nfe, o.prefill_forwards) for o in alone
        ]
    assert [len(o.token_ids) for o in alone] == [2 * CANVAS + 3] * 5


@pytest.mark.slow
@pytest.mark.parametrize("seed", [4, 1234567890123, 2**63 - 1])
def test_compiled_noise_is_philox_and_overflows_nowhere(seed: int) -> None:
    compiled = torch.compile(noise, fullgraph=True, dynamic=False)
    pos = torch.arange(17, 25, dtype=torch.int32)
    for age in range(3):
        words = [philox((0, p, age, 1), seed) * VOCAB >> 32 for p in pos.tolist()]
        asked = torch.tensor([seed]), pos[None], torch.tensor([age], dtype=torch.int32), VOCAB
        assert compiled(*asked).tolist() == noise(*asked).tolist() == [words]


@pytest.mark.long
def test_the_compiled_step_gives_the_eager_answer(quick: Case, tmp_path: Path) -> None:
    prompt, params = ids(17, 1).tolist(), SamplingParams(2 * CANVAS, temperature=1.0, seed=4)
    folder = gemma.write(tmp_path, gemma.tensors(quick.net))
    config: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_num_seqs": 1}
    with LLM(folder, policy=QUICK_POLICY, graphs="compile", **config) as llm:
        (out,) = llm.generate(prompt, params)
    (eager,) = quick.llm.generate(prompt, params)
    assert (out.token_ids, out.nfe) == (eager.token_ids, eager.nfe)


def test_a_request_that_was_dropped_leaves_nothing_to_the_next_in_its_slot(quick: Case) -> None:
    params = SamplingParams(CANVAS, temperature=1.0, seed=5)
    (expected,) = quick.llm.generate([7, 8, 9], params)
    dropped = quick.llm.stream([9, 8, 7, 6], params, watch=True)
    assert [len(next(dropped).window) for _ in range(3)] == [CANVAS] * 3
    dropped.close()
    assert quick.llm.generate([7, 8, 9], params)[0].token_ids == expected.token_ids


def test_when_the_forwards_are_spent_the_likeliest_tokens_are_delivered(quick: Case) -> None:
    prompt = ids(4, 8).tolist()
    (out,) = quick.llm.generate(prompt, SamplingParams(3 * CANVAS, temperature=1.0, seed=2, max_nfe=2))
    same_heat = {"max_denoising_steps": 2, "t_min": 0.045}
    expected, _ = generated(quick.net, prompt, CANVAS, 2, **QUICK | same_heat)
    assert (out.finish_reason, out.nfe) == ("max_nfe", 2)
    assert out.token_ids == expected.sequences[0, 4:].tolist()


def test_canvases_and_blocks_are_not_decoded_with_each_others_policies(folder: Path, nano: Path) -> None:
    with pytest.raises(PolicyError, match="diffusion_gemma checkpoint; use policy='diffusion_gemma'"):
        open_llm(folder, "single_bd")
    with pytest.raises(PolicyError, match="sdar checkpoint; use one without a canvas"):
        open_llm(nano, "diffusion_gemma")
    with pytest.raises(PolicyError, match=r"select=EntropyBound\(\) is a rule of canvases"):
        replace(POLICIES["diffusion_gemma"], canvas=None)
    with pytest.raises(PolicyError, match="N=2 blocks with Canvas"):
        replace(POLICIES["diffusion_gemma"], N=2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text_config": None}, "text_config is missing"),
        ({"text_config": {"layer_types": ["sliding_attention"]}}, "layer_types="),
        ({"text_config": {"hidden_activation": "silu"}}, "hidden_activation='silu'"),
        ({"text_config": {"use_bidirectional_attention": "all"}}, "use_bidirectional_attention='all'"),
        ({"text_config": {"global_head_dim": None}}, "global_head_dim is missing"),
        ({"text_config": {"per_layer_config": {"1": {"head_dim": 32}}}}, "per_layer_config="),
        ({"text_config": {"num_global_key_value_heads": 3}}, "num_global_key_value_heads=3"),
        ({"text_config": {"rope_parameters": {}}}, "rope_parameters="),
        ({"text_config": {"final_logit_softcapping": None}}, "final_logit_softcapping is missing"),
        ({"text_config": {"top_k_experts": 9}}, "top_k_experts=9"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
    ],
)
def test_a_config_of_another_network_is_refused_by_key(change: dict[str, Any], said: str) -> None:
    config = gemma.published()
    text = change.get("text_config", {})
    config |= change | {"text_config": None if text is None else config["text_config"] | text}
    with pytest.raises(ModelError, match=re.escape(said)):
        Card.from_hf(config, {})


def test_the_published_config_gives_the_true_shape() -> None:
    card = Card.from_hf(json.loads((DATA / "configs" / "diffusion_gemma_26b_a4b.json").read_text()), {})
    assert (card.blocks, card.stop_ids, card.pad_id, card.mask_id) == ((256,), (1, 106), 0, -1)
    kind = family(card.arch)
    places = kind.places(card)
    found = Counter((re.sub(r"\blayers\.\d+", "layers.N", name), place.shape) for name, place in places.items())
    listed = json.loads((DATA / "tensors" / "diffusion_gemma_26b_a4b.json").read_text())
    assert found == {(one["name"], tuple(one["shape"])): one["count"] for one in listed}
    params = dict(kind.build(card, torch.device("meta"), torch.bfloat16).named_parameters())
    scalars = 2 * card.layers  # buffers to transformers
    assert sum(p.numel() for p in params.values()) - scalars == 25_250_986_752
    for place in (*places.values(), *kind.stacked(card).values()):
        shape = params[place.param].shape
        assert place.row + place.rows <= (shape[:-1].numel() if len(shape) > 1 else shape[0])
        assert len(place.shape) == 1 or place.shape[-1] == shape[-1]
    assert set(card.kv) == {(8, 256), (2, 512)}


def test_experts_one_by_one_of_which_some_are_missing_are_refused(
    theirs: DiffusionGemmaForBlockDiffusion, tmp_path: Path
) -> None:
    tensors = gemma.apart(gemma.tensors(theirs))
    tensors.pop(next(name for name in tensors if "experts.3.up_proj" in name))
    gemma.write(tmp_path, tensors)
    with pytest.raises(ModelError, match="some are missing or twice there"):
        opened(tmp_path)


def test_an_adapter_is_merged_but_not_kept_apart(folder: Path, tmp_path: Path) -> None:
    module = f"{gemma.DECODER}layers.0.self_attn.k_proj"
    adapter = write_adapter(tmp_path / "adapter", {module: (2 * 16, 48)})
    with pytest.raises(ConfigError, match=r"adapters=\['mine'\] .* merge one: lora=FOLDER"):
        LLM(folder, device="cpu", adapters={"mine": adapter})
    factors = load_file(adapter / "adapter_model.safetensors")
    b, a = (factors[f"base_model.model.{module}.lora_{x}.weight"] for x in "BA")
    with LLM(folder, device="cpu") as plain, LLM(folder, device="cpu", lora=adapter) as merged:
        added = [dict(x.engine.worker.net.named_parameters())["layers.0.attn.qkv.weight"] for x in (merged, plain)]
    assert torch.allclose((added[0] - added[1])[4 * 16 : 6 * 16], 1.5 * b @ a, atol=1e-6)
