"""The bundled model's trainer: rows, noise, masks, losses, optimizer, state and export."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from dlx.errors import ConfigError
from tools.tiny.export import export, load
from tools.tiny.muon import orthogonal
from tools.tiny.network import PRESETS, Network
from tools.tiny.noise import Noise, Rows, corrupt, dense_mask
from tools.tiny.objective import masked_rows, own_guesses, target
from tools.tiny.recipe import Recipe
from tools.tiny.rows import Packed, Packing, Workers, packed
from tools.tiny.state import Model, build, save, start
from tools.tiny.train import Draws, step
from tools.tiny.vocabulary import END, MASK, PAD, train_tokenizer

SHAPE = replace(PRESETS["nano"], vocab=320)
MIX = {"add2": 1.0}
L = 8


def network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network(SHAPE)


def batch(tokenizer: Tokenizer, rows: int = 4, row_tokens: int = 64, seed: int = 0) -> Packed:
    return next(packed(tokenizer, Packing(MIX, {16: 1.0}, rows, row_tokens), seed))


def as_rows(batch: Packed) -> Rows:
    ids, prompt, doc, pos = (torch.from_numpy(column).long() for column in batch[1:])
    return Rows(batch.block_length, ids, prompt, doc, pos)


def written_rows() -> Rows:
    """Row 0: documents of 4 and 3 blocks and a block of padding; row 1: one of 8 blocks."""
    doc, pos, prompt = (torch.zeros(2, 64, dtype=torch.long) for _ in range(3))
    prompt[:] = 1 << 14
    for b, at, n, number, length in ((0, 0, 32, 1, 5), (0, 32, 24, 2, 11), (1, 0, 64, 1, 18)):
        doc[b, at : at + n], pos[b, at : at + n] = number, torch.arange(n)
        prompt[b, at : at + n] = length
    ids = torch.randint(4, 320, (2, 64), generator=torch.Generator().manual_seed(1))
    return Rows(L, ids, prompt, doc, pos)


def noise_of(rows: Rows, seed: int, share: float = 0.7) -> Noise:
    return corrupt(rows, 4, share, torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tokenizer(nano: Path) -> Tokenizer:
    return Tokenizer.from_file(str(nano / "tokenizer.json"))


@pytest.fixture
def model(tokenizer: Tokenizer) -> Model:
    return build(Recipe(mix=MIX), network(), tokenizer)


def test_a_token_sees_what_the_block_diffusion_objective_says() -> None:
    rows = written_rows()
    noise = noise_of(rows, 0)
    mask = dense_mask(rows.doc, noise.block, noise.group)[:, 0]
    B, R = rows.doc.shape
    doc, block, group = rows.doc.tolist(), noise.block.tolist(), noise.group.tolist()
    for b in range(B):
        for q in range(2 * R):
            for k in range(2 * R):
                own, other, first = block[b][q % R], block[b][k % R], group[b][q % R]
                noisy, clean = (first <= other <= own, other < first) if q < R else (False, other <= own)
                sees = (noisy if k < R else clean) and doc[b][q % R] == doc[b][k % R]
                assert mask[b, q, k].item() == sees


def test_only_answers_are_masked_and_every_answer_block_has_a_masked_token() -> None:
    rows = written_rows()
    answer = (rows.pos >= rows.prompt) & (rows.doc > 0)
    for seed in range(20):
        noise = noise_of(rows, seed)
        assert not (noise.masked & ~answer).any()
        n, k = (x.view(2, 8, L).sum(-1) for x in (answer, noise.masked))
        assert torch.equal(k > 0, n > 0)
        weight = noise.weight.view(2, 8, L)[..., 0]
        assert torch.equal(weight[n > 0], (n / k)[n > 0])


def test_noise_groups_start_in_the_answer_and_have_at_most_four_blocks() -> None:
    rows = written_rows()
    since = []
    for seed in range(50):
        noise = noise_of(rows, seed)
        first = torch.where(rows.doc > 0, rows.prompt // L, noise.block)
        assert ((noise.group == noise.block) | (noise.group >= first)).all()
        since.append(noise.block - noise.group)
    assert torch.stack(since).unique().tolist() == [0, 1, 2, 3]


def test_without_groups_every_block_is_noisy_alone() -> None:
    rows = written_rows()
    noise = corrupt(rows, 1, 0.7, torch.Generator().manual_seed(0))
    assert torch.equal(noise.group, noise.block)


@torch.no_grad()
def test_a_training_pass_gives_what_decoding_step_by_step_gives() -> None:
    net = network().eval()
    R = 40
    ids = torch.randint(4, 320, (1, R), generator=torch.Generator().manual_seed(0))
    noisy = torch.where(torch.rand(1, R, generator=torch.Generator().manual_seed(1)) < 0.5, MASK, ids)
    doc, pos = torch.ones_like(ids), torch.arange(R)[None]
    block = pos // L
    group = block // 2 * 2  # two blocks are noisy together
    both = net(torch.cat((noisy, ids), 1), torch.cat((pos, pos), 1), dense_mask(doc, block, group))
    for first in range(0, 4, 2):
        start, end = first * L, (first + 2) * L
        seen = torch.cat((ids[:, :start], noisy[:, start:end]), 1)
        causal = (block[0, :end, None] >= block[0, None, :end])[None, None]
        alone = net(seen, pos[:, :end], causal)
        torch.testing.assert_close(both[:, start:end], alone[:, start:], rtol=1e-5, atol=1e-5)


def test_the_networks_state_has_the_bundled_checkpoints_names_and_shapes(tiny: Path) -> None:
    net = load(tiny)  # strict
    assert net.shape == PRESETS["m"]
    named = json.loads((tiny / "model.safetensors.index.json").read_text())["weight_map"]
    assert list(named) == [f"model.{name}" for name in net.state_dict()]


def test_an_exported_network_loads_with_safetensors_and_comes_back(tmp_path: Path, tokenizer: Tokenizer) -> None:
    net = network()
    export(net, tokenizer, [16, 32], tmp_path, shard_bytes=200_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    assert all(file.stat().st_size < 205_000 for file in files)
    stored: dict[str, Tensor] = {}
    for file in files:
        stored |= load_file(file)
    for name, weight in net.state_dict().items():
        assert torch.equal(stored[f"model.{name}"], weight.bfloat16())
        assert torch.equal(load(tmp_path).state_dict()[name], weight.bfloat16().float())
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["block_length"], config["trained_block_lengths"]) == (16, [16, 32])


def test_a_second_export_leaves_no_shard_of_the_first(tmp_path: Path, tokenizer: Tokenizer) -> None:
    export(network(), tokenizer, [16], tmp_path, shard_bytes=200_000)
    export(network(), tokenizer, [16], tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["model-00001-of-00001.safetensors"]


def test_packed_rows_hold_whole_documents_in_whole_blocks(tokenizer: Tokenizer) -> None:
    made = batch(tokenizer)
    assert made.block_length == 16
    for b in range(4):
        numbers = made.doc[b].max()
        assert numbers >= 1
        for number in range(1, numbers + 1):
            (at,) = (made.doc[b] == number).nonzero()
            ids, length = made.ids[b, at], made.prompt[b, at][0]
            assert len(at) % 16 == 0
            assert made.pos[b, at].tolist() == list(range(len(at)))
            end = ids[length:].tolist().index(END) + length
            assert (ids[end + 1 :] == PAD).all()
            prompt, answer = tokenizer.decode(ids[:length]), tokenizer.decode(ids[length:end])
            left, right = prompt.removeprefix("user\n").split("\n")[0].removesuffix(" =").split(" + ")
            assert int(left) + int(right) == int(answer)


def test_a_worker_makes_the_rows_of_its_seed(nano: Path, tokenizer: Tokenizer) -> None:
    packing = Packing(MIX, {16: 1.0}, 2, 64)
    with closing(Workers(nano / "tokenizer.json", packing, 5, 1)) as workers:
        made = workers.next()
    expected = next(packed(tokenizer, packing, 5))
    assert made.block_length == expected.block_length
    for mine, theirs in zip(expected[1:], made[1:], strict=True):
        assert (mine == theirs).all()


def test_the_loss_falls_within_a_few_steps(model: Model, tokenizer: Tokenizer) -> None:
    recipe = Recipe(mix=MIX, lr=3e-3, own_from=0.5)
    draws = Draws(Random(0), torch.Generator().manual_seed(0))
    losses, own = [], []
    for i in range(24):
        rows = as_rows(batch(tokenizer, seed=i))
        seen = step(recipe, model, model.network.layers, rows, i / 24, draws)
        losses.append(seen["loss"].item())
        own += [seen["own"].item()] if "own" in seen else []
        model.progress.step += 10
    assert losses[0] > 5.0
    assert sum(losses[-4:]) / 4 < 0.5 * losses[0]
    assert own


def test_weights_of_the_targets_sum_to_one_and_favour_sparsely_masked_blocks() -> None:
    rows = written_rows()
    noise = noise_of(rows, 3)
    goal = target(rows, noise, power=0.5)
    assert goal.weight.sum().item() == pytest.approx(1.0)
    ratio = noise.weight[goal.b, goal.at].sqrt()
    torch.testing.assert_close(goal.weight, ratio / ratio.sum())
    assert torch.equal(goal.ids, rows.ids[noise.masked])


@torch.no_grad()
def test_own_guesses_replace_only_masked_tokens_and_soft_ones_mix_the_masks_embedding() -> None:
    net, rows = network(), written_rows()
    noise = noise_of(rows, 4)
    goal, noisy = target(rows, noise, 0.5), masked_rows(rows, noise)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(len(goal.ids), 320, generator=generator)
    filled, embedded = own_guesses(net, rows, noisy, goal, logits, generator, drawn=False, soft=True)
    assert torch.equal(filled[~noise.masked], rows.ids[~noise.masked])
    guess, p = logits.argmax(-1), logits.softmax(-1).amax(-1)
    guessed = filled[goal.b, goal.at] != MASK
    assert guessed.float().mean().item() == pytest.approx(0.85, abs=0.15)
    assert torch.equal(filled[goal.b, goal.at][guessed], guess[guessed])
    assert embedded is not None
    table = net.embed_tokens.weight
    mixed = table[guess] * p[:, None] + table[MASK] * (1 - p[:, None])
    torch.testing.assert_close(embedded[goal.b, goal.at][guessed], mixed[guessed])
    torch.testing.assert_close(embedded[:, 64:], table[rows.ids])


def test_clean_tokens_stand_in_for_some_guesses_and_are_mixed_by_their_own_probability() -> None:
    net, rows = network(), written_rows()
    noise = noise_of(rows, 4)
    goal, noisy = target(rows, noise, 0.5), masked_rows(rows, noise)
    logits = torch.randn(len(goal.ids), 320, generator=torch.Generator().manual_seed(0))
    logits[torch.arange(len(goal.ids)), goal.ids] -= 9.0  # no guess is right
    shares = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        filled, embedded = own_guesses(net, rows, noisy, goal, logits, generator, drawn=False, soft=True, clean=0.8)
        shown = filled[goal.b, goal.at]
        right = shown == goal.ids
        assert torch.equal(shown[~right & (shown != MASK)], logits.argmax(-1)[~right & (shown != MASK)])
        shares.append(right[shown != MASK].float().mean().item())
        p = logits.softmax(-1).gather(1, goal.ids[:, None])[right]
        table = net.embed_tokens.weight
        assert embedded is not None
        torch.testing.assert_close(embedded[goal.b, goal.at][right], table[goal.ids[right]] * p + table[MASK] * (1 - p))
    assert sum(shares) / 40 == pytest.approx(0.4, abs=0.1)
    assert max(shares) - min(shares) > 0.2


def test_an_orthogonalised_stack_keeps_its_directions_and_evens_their_sizes() -> None:
    stack = torch.randn(3, 24, 8, generator=torch.Generator().manual_seed(0))
    out = orthogonal(stack)
    sizes = torch.linalg.svdvals(out)
    assert sizes.min() > 0.6
    assert sizes.max() < 1.3
    u, _, v = torch.linalg.svd(stack, full_matrices=False)
    turned = u.mT @ out @ v.mT
    assert (turned * (1 - torch.eye(8))).abs().max() < 1e-3


def test_training_goes_on_from_its_state_file(tmp_path: Path, model: Model, tokenizer: Tokenizer) -> None:
    recipe = Recipe(mix=MIX, own_from=1.0)
    draws = Draws(Random(0), torch.Generator().manual_seed(0))
    step(recipe, model, model.network.layers, as_rows(batch(tokenizer)), 0.3, draws)
    model.progress.step, model.progress.used_s = 1, 2.5
    path = tmp_path / "state.pt"
    save(model, path)
    again = start(recipe, path, None, torch.device("cpu"))
    assert again.progress == model.progress
    assert again.tokenizer.to_str() == tokenizer.to_str()
    rows = as_rows(batch(tokenizer, seed=1))
    for one in (model, again):
        draws = Draws(Random(1), torch.Generator().manual_seed(1))
        step(recipe, one, one.network.layers, rows, 0.3, draws)
    for name, weight in model.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], weight), name


def test_the_tokenizer_writes_digits_one_by_one_and_keeps_special_ids() -> None:
    trained = train_tokenizer(MIX, 300, samples=200)
    ids = trained.encode("12 + 34 =").tokens
    assert [token for token in ids if token.isdigit()] == ["1", "2", "3", "4"]
    assert [trained.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>", "<|MASK|>")] == [
        PAD,
        END,
        MASK,
    ]


def test_the_learning_rate_rises_stays_and_falls() -> None:
    recipe = Recipe(lr=1.0)
    assert recipe.rate(0, 0.0) == pytest.approx(1 / 200)
    assert recipe.rate(1000, 0.4) == 1.0
    assert recipe.rate(1000, 0.75) == pytest.approx(0.5)
    assert recipe.rate(1000, 1.0) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"preset": "xl"}, "preset='xl' is unknown; use one of nano, s, m"),
        ({"row_tokens": 72}, r"row_tokens=72 is no multiple of the block lengths \[16, 32\]"),
        ({"minutes": 0.0}, "minutes=0.0 is not allowed"),
        ({"mix": {}}, "mix is empty"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**wrong).check()  # type: ignore[arg-type]
