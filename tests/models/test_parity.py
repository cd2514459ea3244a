"""dlx on the CPU in fp32 says, token for token and forward for forward, what the reference decoder says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from dlx import LLM, SamplingParams
from dlx.graphs.policies import POLICIES, Policy
from dlx.graphs.rules import Fixed
from dlx.models import family
from dlx.models.card import Card
from dlx.models.decoder import Decoder
from dlx.ops.attention import View
from dlx.tasks import MIX, TASKS, installed, sample
from dlx.weights import load, read_config
from tests.checkpoints import STOP, UNDECLARED, ZOO, Shape, write
from tests.reference import Ask, Decoded, Qwen3, Strategy, compare, decode

STRATEGIES = {
    "single_bd": Strategy(L=16, N=1, threshold=0.9, open_at=1.0, force_at=0.9),
    "multi_bd": Strategy(L=16, N=4, threshold=0.9, open_at=0.1, force_at=0.9),
}
HELD_OUT = 200  # prompts of the bundled model a policy


class Case(NamedTuple):
    """One request, as both sides are asked for it."""

    prompt: list[int]
    strategy: Strategy
    ask: Ask
    params: SamplingParams


class Pair(NamedTuple):
    """A checkpoint in dlx and in transformers."""

    llm: LLM
    network: Qwen3


def open_llm(folder: Path, policy: str | Policy, block_length: int | None = None) -> LLM:
    return LLM(
        folder,
        policy=policy,
        graphs="off",
        device="cpu",
        dtype="float32",
        block_length=block_length,
        max_num_seqs=8,
    )


def hold(pair: Pair, cases: Sequence[Case]) -> list[Decoded]:
    """Decode the cases on both sides; all must agree, but for one in a hundred excused by a near decision."""
    got = pair.llm.generate([case.prompt for case in cases], [case.params for case in cases])
    expected = [decode(pair.network, case.prompt, case.strategy, case.ask) for case in cases]
    excused, wrong = 0, []
    for i, (case, ours, theirs) in enumerate(zip(cases, expected, got, strict=True)):
        try:
            excused += compare(ours, theirs)
        except AssertionError as error:
            wrong.append(f"case {i}: prompt {case.prompt}, {case.strategy}, {case.ask}\n{error}")
    assert not wrong, f"{len(wrong)} of {len(cases)} answers differ\n\n" + "\n\n".join(wrong[:3])
    assert excused <= len(cases) / 100, f"{excused} of {len(cases)} answers differ after a near decision"
    return expected


def questions(folder: Path, mix: dict[str, float], n: int, seed: int) -> list[list[int]]:
    """→ n different held-out prompts in the chat template, as ids."""
    tokenizer, rng, drawn = (
        Tokenizer.from_file(str(folder / "tokenizer.json")),
        Random(seed),
        dict[str, None](),
    )
    while len(drawn) < n:
        drawn[sample(rng, mix, want_held=True).prompt] = None
    chats = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in drawn]
    return [encoding.ids for encoding in tokenizer.encode_batch(chats, add_special_tokens=False)]


def trained_cases(prompts: list[list[int]], policy: str, taus: Sequence[float | None], n: int) -> list[Case]:
    """Prompts for a trained model; the thresholds take turns, None being the policy's own."""
    cases = []
    for i, prompt in enumerate(prompts):
        tau = taus[i % len(taus)]
        strategy = STRATEGIES[policy] if tau is None else replace(STRATEGIES[policy], threshold=tau)
        ask = Ask(n, stop_ids=frozenset({STOP}))
        cases.append(Case(prompt, strategy, ask, SamplingParams(max_tokens=n, threshold=tau)))
    return cases


@pytest.mark.parametrize("policy", STRATEGIES)
def test_the_nano_model_decodes_like_the_reference(nano: Path, policy: str) -> None:
    prompts = questions(nano, {"chain3": 1.0, "add2": 1.0}, 40, seed=0)
    with open_llm(nano, policy) as llm:
        expected = hold(Pair(llm, Qwen3(nano, 16)), trained_cases(prompts, policy, (None, 0.5, 0.99), n=48))
    assert sum(out.finish == "stop" for out in expected) > 30


@pytest.mark.parametrize(
    "some", [pytest.param(HELD_OUT // 3, marks=pytest.mark.slow), pytest.param(HELD_OUT, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("policy", STRATEGIES)
def test_the_bundled_model_decodes_held_out_prompts_like_the_reference(tiny: Path, policy: str, some: int) -> None:
    shares = MIX | {"story": 0.02, "rgsm": 0.05}  # the longest answers: at their full shares they take most time
    mix = {name: share for name, share in installed(shares).items() if not TASKS[name].closed}
    prompts = questions(tiny, mix, some, seed=1)
    with open_llm(tiny, policy) as llm:
        expected = hold(Pair(llm, Qwen3(tiny, 16)), trained_cases(prompts, policy, (None,), n=224))
    assert sum(out.finish == "stop" for out in expected) > 0.95 * some
    assert sum(len(out.tokens) for out in expected) > 4 * sum(out.nfe for out in expected)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The five random checkpoints, in one to three shards."""
    root = tmp_path_factory.mktemp("zoo")
    return {name: write(root / name, ZOO[name], i, shards=1 + i % 3) for i, name in enumerate(ZOO)}


@pytest.fixture(scope="module", params=[(name, policy) for name in ZOO for policy in STRATEGIES], ids="-".join)
def random_pair(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Iterator[tuple[str, str, Pair]]:
    """Each random checkpoint under each policy."""
    name, policy = request.param
    with open_llm(folders[name], policy) as llm:
        yield name, policy, Pair(llm, Qwen3(folders[name], ZOO[name].block_length))


def random_case(rng: Random, network: Qwen3, shape: Shape, policy: str, length: int, fixed: int | None = None) -> Case:
    """A random prompt of so many tokens, and a random way to ask for its answer.

    Two in five are stopped by a token that the answer would otherwise hold, and two in five spend their last
    forward on some token of it.
    """
    L = shape.block_length
    words = [i for i in range(shape.words) if i not in (shape.mask_id, shape.stop_id)]
    prompt = [rng.choice(words) for _ in range(length)]
    numbers = {
        "threshold": rng.choice((None, 0.35, 0.5, 0.6, 0.75)),
        "open_at": rng.choice((None, 0.0, 0.3, 0.75)),
        "force_at": rng.choice((None, 0.0, 0.5, 1.0)),
    }
    given = {name: number for name, number in numbers.items() if number is not None}  # else the policy's own
    strategy = replace(STRATEGIES[policy], L=L, fixed=fixed, **given)
    n = rng.choice((rng.randint(1, L), rng.randint(1, 3 * L), rng.randint(1, 3 * L), 6 * L + 3))
    whole = decode(network, prompt, strategy, Ask(n))
    at, turn, ignore_eos = rng.randrange(n), rng.randrange(5), rng.random() < 0.2
    extra = (whole.tokens[at],) if turn < 2 else ()
    max_nfe = whole.age[at] + 1 if turn in (1, 2) else None
    ask = Ask(n, max_nfe, frozenset({shape.stop_id, *extra}), ignore_eos)
    params = SamplingParams(n, max_nfe=max_nfe, ignore_eos=ignore_eos, stop_token_ids=extra)
    return Case(prompt, strategy, ask, replace(params, **given))


def test_random_models_decode_like_the_reference(random_pair: tuple[str, str, Pair]) -> None:
    name, policy, pair = random_pair
    rng, L = Random(name + policy), ZOO[name].block_length
    lengths = (1, L - 1, L, L + 1, 2 * L - 2, 3 * L)
    hold(pair, [random_case(rng, pair.network, ZOO[name], policy, n) for n in lengths])


@pytest.mark.long
def test_random_models_decode_like_the_reference_after_prompts_of_every_length(
    random_pair: tuple[str, str, Pair],
) -> None:
    name, policy, pair = random_pair
    rng, L = Random(policy + name), ZOO[name].block_length
    rounds = max(1, 512 // L**2)  # short blocks have few lengths and cost little
    lengths = [n for n in range(1, 2 * L + 1) for _ in range(rounds)]
    cases = [random_case(rng, pair.network, ZOO[name], policy, n) for n in lengths]
    expected = hold(pair, cases)
    seen = [forward for out in expected for forward in out.forwards]
    assert {out.finish for out in expected} == {"stop", "length", "max_nfe"}
    assert any(len(f.wrote) > 1 and not f.forced for f in seen)
    assert any(f.forced for f in seen)
    assert max(f.opened for f in seen) == STRATEGIES[policy].N + 1
    ends = [(out, len(case.prompt) + len(out.tokens)) for case, out in zip(cases, expected, strict=True)]
    assert all(any(end % L for out, end in ends if out.finish == why) for why in ("stop", "length"))


@pytest.mark.parametrize("policy", STRATEGIES)
@pytest.mark.parametrize("k", [1, 3])
def test_fixed_acceptance_decodes_like_the_reference(folders: dict[str, Path], policy: str, k: int) -> None:
    shape, rng = ZOO["b8"], Random(k)
    network = Qwen3(folders["b8"], 8)
    cases = [random_case(rng, network, shape, policy, length, fixed=k) for length in range(1, 17, 2)]
    with open_llm(folders["b8"], replace(POLICIES[policy], select=Fixed(k))) as llm:
        hold(Pair(llm, network), cases)


@pytest.mark.parametrize("policy", STRATEGIES)
def test_a_block_length_of_the_callers_choice_decodes_like_the_reference(tmp_path: Path, policy: str) -> None:
    shape, rng = replace(ZOO["b16"], also=(8,)), Random(policy)
    network = Qwen3(write(tmp_path, shape, 0), 8)
    cases = [random_case(rng, network, replace(shape, block_length=8), policy, n) for n in range(1, 17, 3)]
    with open_llm(tmp_path, policy, block_length=8) as llm:
        hold(Pair(llm, network), cases)


@pytest.mark.slow
def test_a_config_without_block_size_and_mask_id_means_sdars(tmp_path: Path) -> None:
    folder = write(tmp_path, UNDECLARED, 0, declare=False)
    network, rng = Qwen3(folder, UNDECLARED.block_length, UNDECLARED.mask_id), Random(0)
    with open_llm(folder, "multi_bd") as llm:
        hold(
            Pair(llm, network),
            [random_case(rng, network, UNDECLARED, "multi_bd", length) for length in range(1, 9)],
        )


class Pages(NamedTuple):
    """dlx's network of one checkpoint, with empty pages for one row of so many blocks."""

    net: Decoder
    kv: tuple[Tensor, ...]
    table: Tensor
    L: int

    def logits(self, ids: Tensor, first: int, causal: bool = False) -> Tensor:
        """Ids [T] at positions `first` on → [T, V]; they see what is in the pages before them."""
        pos = torch.arange(first, first + len(ids), dtype=torch.int32)[None]
        seen = pos + 1 if causal else (pos // self.L + 1) * self.L
        view = View(pos=pos, pages=self.table, seen=seen.int())
        with torch.inference_mode():
            hidden = self.net(self.net.embed(ids[None].int()), view, self.kv)
            return (hidden @ self.net.head().T)[0]


def open_pages(folder: Path, L: int, blocks: int) -> Pages:
    card = Card.from_hf(*read_config(folder))
    made = family(card.arch)
    net = made.build(card, torch.device("cpu"), torch.float32)
    load(folder, made.places(card), dict(net.named_parameters()))
    kv = tuple(torch.zeros(2, blocks, L, card.kv_heads, card.head_dim) for _ in range(card.layers))
    return Pages(net, kv, torch.arange(blocks, dtype=torch.int32)[None], L)


def error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


class Logits(NamedTuple):
    """What transformers says about random ids."""

    folder: Path
    L: int
    ids: Tensor
    theirs: Tensor


@pytest.fixture(scope="module", params=[*ZOO, "nano", "bundled"])
def logits(request: pytest.FixtureRequest, folders: dict[str, Path], nano: Path, tiny: Path) -> Logits:
    """Random ids through a checkpoint on both sides, all at once."""
    folder = (folders | {"nano": nano, "bundled": tiny})[request.param]
    L = ZOO[request.param].block_length if request.param in ZOO else 16
    ids = torch.randint(4, 280, (5 * L,), generator=torch.Generator().manual_seed(0))
    return Logits(folder, L, ids, Qwen3(folder, L)(ids.tolist(), list(range(len(ids)))))


def test_the_network_gives_transformers_logits_under_a_block_causal_mask(logits: Logits) -> None:
    pages = open_pages(logits.folder, logits.L, 5)
    assert error(pages.logits(logits.ids, 0), logits.theirs) < 1e-5


def test_the_network_gives_transformers_logits_block_by_block_from_pages(logits: Logits) -> None:
    pages = open_pages(logits.folder, logits.L, 5)
    parts = [pages.logits(part, i * logits.L) for i, part in enumerate(logits.ids.split(logits.L))]
    assert error(torch.cat(parts), logits.theirs) < 1e-5


def test_swapped_norms_or_another_mask_do_not_give_transformers_logits(logits: Logits) -> None:
    pages = open_pages(logits.folder, logits.L, 5)
    assert error(pages.logits(logits.ids, 0, causal=True), logits.theirs) > 1e-2
    for layer in pages.net.layers:
        attn = layer.attn
        attn.q_norm, attn.k_norm = attn.k_norm, attn.q_norm
    assert error(pages.logits(logits.ids, 0), logits.theirs) > 1e-2
