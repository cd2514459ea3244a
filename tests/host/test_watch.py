"""Watched requests: proposals and confidences are the network's, and watching changes no answer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dlx import LLM, Chunk, SamplingParams
from dlx.graphs.policies import POLICIES, Policy
from tests import gemma
from tests.families import network, write
from tests.reference import Qwen3

CONF_ATOL = 1e-4  # fp32, added up in another order
NEAR = 1e-5  # two probabilities nearer than this may change places
PROMPTS = [[1, 267, 202, *random.Random(n).choices(range(36, 99), k=n)] for n in (3, 12, 13, 24)]
PARAMS = [
    SamplingParams(max_tokens=40, ignore_eos=True, threshold=0.6),
    SamplingParams(max_tokens=33),
    SamplingParams(max_tokens=21, temperature=1.5, seed=3, threshold=0.3),
]


def opened(folder: Path, policy: str | Policy | None, **config: Any) -> LLM:
    return LLM(folder, policy=policy, **{"graphs": "off", "device": "cpu", "dtype": "float32"} | config)


class State(NamedTuple):
    """What a chunk shows: everything decided so far, and the window behind it."""

    done: list[int]
    window: list[int]
    confidence: list[float]
    guess: list[int]


def states(chunks: list[Chunk]) -> Iterator[State]:
    done: list[int] = []
    for chunk in chunks[:-1]:
        done = done + chunk.token_ids
        yield State(done, chunk.window, chunk.confidence, chunk.guess)


@pytest.fixture(scope="module")
def qwen3(nano: Path) -> Qwen3:
    return Qwen3(nano, 16)


def probabilities(net: Qwen3, ids: list[int], rows: list[int]) -> Tensor:
    """[rows, V]: what the reference network thinks of the positions `rows`, mask and padding outside."""
    logits = net(ids, rows).clone()
    logits[:, net.mask_id] = float("-inf")
    logits[:, net.vocab :] = float("-inf")
    return logits.softmax(-1)


@pytest.mark.parametrize("policy", ["single_bd", "multi_bd"])
def test_guesses_and_confidences_are_those_of_another_network_over_the_same_state(
    nano: Path, qwen3: Qwen3, policy: str
) -> None:
    """Each shown state is recomputed from the one before it, in which a position was a mask."""
    compared = 0
    with opened(nano, policy, watch=True) as llm:
        mask = llm.card.mask_id
        for prompt, threshold in zip(PROMPTS, (1.0, 0.6, 0.9, 1.0), strict=True):
            params = replace(PARAMS[0], threshold=threshold)
            seen = list(states(list(llm.stream(prompt, params, watch=True))))
            for before, after in pairwise(seen):
                base = len(prompt) + len(before.done)
                end = len(prompt) + len(after.done) + len(after.window)
                ids = [*prompt, *before.done, *before.window]
                ids += [mask] * (end - len(ids))  # a block that was opened in between
                first = len(prompt) + len(after.done)
                rows = [i for i in range(max(base, first), end) if ids[i] == mask]
                if not rows:
                    continue
                p = probabilities(qwen3, ids, rows)
                best, runner = p.topk(2, -1).values.unbind(-1)
                for at, row in enumerate(rows):
                    guess, conf = after.guess[row - first], after.confidence[row - first]
                    assert conf == pytest.approx(float(p[at, guess]), abs=CONF_ATOL)
                    assert guess == int(p[at].argmax()) or float(best[at] - runner[at]) < NEAR
                    assert after.window[row - first] in (mask, guess)
                    compared += 1
    assert compared > 200


def test_an_accepted_token_keeps_the_confidence_it_was_accepted_with(nano: Path) -> None:
    kept = 0
    with opened(nano, "single_bd", watch=True) as llm:
        mask = llm.card.mask_id
        for prompt in PROMPTS:
            seen = list(states(list(llm.stream(prompt, replace(PARAMS[0], threshold=0.95), watch=True))))
            for before, after in pairwise(seen):
                if after.done != before.done:
                    continue
                for i, token in enumerate(before.window):
                    if token != mask:
                        assert (after.guess[i], after.confidence[i]) == (token, before.confidence[i])
                        kept += 1
    assert kept > 50


@pytest.mark.parametrize("policy", ["single_bd", "multi_bd", "edit", "dmax", "credit", "hierarchical"])
def test_text_is_the_same_with_and_without_watch(nano: Path, policy: str) -> None:
    with opened(nano, policy) as plain, opened(nano, policy, watch=True) as llm:
        for prompt, params in zip(PROMPTS, [*PARAMS, PARAMS[0]], strict=True):
            (expected,) = plain.generate(prompt, params)
            for got in (llm.generate(prompt, params)[0], list(llm.stream(prompt, params, watch=True))[-1].output):
                assert got is not None
                assert (got.token_ids, got.text, got.nfe) == (expected.token_ids, expected.text, expected.nfe)


@pytest.mark.parametrize("policy", ["single_bd", "multi_bd", "edit", "credit"])
def test_what_is_decided_is_shown_as_proposed(nano: Path, policy: str) -> None:
    """Where tokens are edited, scored or stay: a token of a window is the guess at its place."""
    shown = 0
    with opened(nano, policy, watch=True) as llm:
        for prompt in PROMPTS:
            for state in states(list(llm.stream(prompt, PARAMS[1], watch=True))):
                assert len(state.window) == len(state.confidence) == len(state.guess)
                assert all(0 < p <= 1 + 1e-6 for p in state.confidence)
                decided = [(t, g) for t, g in zip(state.window, state.guess) if t != llm.card.mask_id]
                assert all(token == guess for token, guess in decided)
                shown += len(decided)
    assert shown > 20


def test_without_the_config_windows_have_ids_alone(nano_llm: LLM) -> None:
    chunks = list(nano_llm.stream(PROMPTS[1], PARAMS[0], watch=True))
    assert any(chunk.window for chunk in chunks)
    assert all(chunk.confidence == [] and chunk.guess == [] for chunk in chunks)
    assert nano_llm.engine.worker.buf.mem == {}


def test_watched_and_unwatched_requests_share_a_batch_and_get_their_own(nano: Path) -> None:
    with opened(nano, "multi_bd", watch=True, max_num_seqs=4) as llm:
        alone = [list(llm.stream(prompt, PARAMS[0], watch=True)) for prompt in PROMPTS]
        engine = llm.engine
        ids = [engine.add_all([(prompt, PARAMS[0])], watch=n != 1)[0] for n, prompt in enumerate(PROMPTS)]
        got: dict[int, list[Chunk]] = {id: [] for id in ids}
        while not engine.idle:
            for chunk in engine.step():
                got[chunk.id].append(chunk)
    for n, (id, expected) in enumerate(zip(ids, alone, strict=True)):
        if n == 1:
            assert all(chunk.window == [] and chunk.token_ids for chunk in got[id])
            continue
        assert [chunk.window for chunk in got[id]] == [chunk.window for chunk in expected]
        assert [chunk.guess for chunk in got[id]] == [chunk.guess for chunk in expected]
        pairs = zip(got[id], expected, strict=True)
        assert all(a.confidence == pytest.approx(b.confidence, abs=CONF_ATOL) for a, b in pairs)


def test_a_request_that_gave_its_pages_up_goes_on_showing_what_it_would_have_shown(nano: Path) -> None:
    params = replace(PARAMS[0], max_tokens=90)
    with opened(nano, "single_bd", watch=True) as llm:
        alone = [list(llm.stream(prompt, params, watch=True)) for prompt in PROMPTS]
    with opened(nano, "single_bd", watch=True, max_num_seqs=4, num_pages=16) as llm:
        engine = llm.engine
        ids = engine.add_all([(prompt, params) for prompt in PROMPTS], watch=True)
        got: dict[int, list[Chunk]] = {id: [] for id in ids}
        while not engine.idle:
            for chunk in engine.step():
                got[chunk.id].append(chunk)
        assert engine.scheduler.preemptions > 0
    for id, expected in zip(ids, alone, strict=True):
        assert [chunk[1:5] for chunk in got[id]] == [chunk[1:5] for chunk in expected]


def test_a_launch_ahead_shows_the_state_of_its_own_forward(nano: Path) -> None:
    """As on a GPU, where the next launch is sent before a window is read: the copy was made in between."""
    with opened(nano, "single_bd", watch=True) as llm:
        expected = list(llm.stream(PROMPTS[2], PARAMS[0], watch=True))
        llm.engine.lag = 1
        got = list(llm.stream(PROMPTS[2], PARAMS[0], watch=True))
    assert [chunk[1:5] for chunk in got] == [chunk[1:5] for chunk in expected]
    assert [chunk[6:] for chunk in got] == [chunk[6:] for chunk in expected]


def test_several_forwards_a_launch_show_the_last(nano: Path) -> None:
    with opened(nano, "single_bd", watch=True) as llm, opened(nano, "single_bd", watch=True, forwards=3) as looped:
        each = list(states(list(llm.stream(PROMPTS[0], PARAMS[0], watch=True))))
        some = list(states(list(looped.stream(PROMPTS[0], PARAMS[0], watch=True))))
    assert some
    assert all(state in each for state in some)


@pytest.mark.parametrize("policy", ["low_confidence", "fast_dllm_v1", "maskgit_plus"])
def test_whole_sequences_are_watched_too(tmp_path: Path, policy: str) -> None:
    net = network("llada", seed=1, spread=6.0)
    folder = write(tmp_path / "llada", "llada", net)
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    with opened(folder, policy, watch=True, block_length=8) as llm, opened(folder, policy, block_length=8) as plain:
        mask = llm.card.mask_id
        chunks = list(llm.stream([9, 8, 7, 6, 5], params, watch=True))
        assert chunks[-1].output is not None
        assert chunks[-1].output.token_ids == plain.generate([9, 8, 7, 6, 5], params)[0].token_ids
        seen = [state for state in states(chunks) if state.window]
        width = 24 if policy == "maskgit_plus" else 8
        assert {len(state.window) for state in seen} == {width}
        assert any(mask in state.window for state in seen)
        for state in seen:
            assert len(state.confidence) == len(state.guess) == width
            assert all(t in (mask, g) for t, g in zip(state.window, state.guess))
            assert all(0 < p <= 1 + 1e-6 for p in state.confidence)


def test_a_canvas_is_watched_too(tmp_path: Path) -> None:
    folder = gemma.write(tmp_path, gemma.tensors(gemma.model()))
    params = SamplingParams(gemma.CANVAS, seed=5, max_nfe=6)
    policy = POLICIES["diffusion_gemma"]
    with opened(folder, policy, watch=True) as llm, opened(folder, policy) as plain:
        chunks = list(llm.stream([7, 8, 9], params, watch=True))
        assert chunks[-1].output is not None
        assert chunks[-1].output.token_ids == plain.generate([7, 8, 9], params)[0].token_ids
        for state in states(chunks):
            assert len(state.window) == len(state.confidence) == len(state.guess) == gemma.CANVAS
            assert all(t in (llm.card.mask_id, g) for t, g in zip(state.window, state.guess))
            assert all(0 < p <= 1 + 1e-6 for p in state.confidence)


@pytest.mark.slow
def test_a_compiled_step_shows_what_the_eager_one_shows(nano: Path) -> None:
    params = SamplingParams(max_tokens=18, ignore_eos=True, threshold=0.6)
    with opened(nano, "single_bd", watch=True, max_num_seqs=1) as llm:
        expected = list(llm.stream(PROMPTS[1], params, watch=True))
    with opened(nano, "single_bd", watch=True, max_num_seqs=1, graphs="compile") as llm:
        got = list(llm.stream(PROMPTS[1], params, watch=True))
    torch._dynamo.reset()
    assert [(c.window, c.guess) for c in got] == [(c.window, c.guess) for c in expected]
    pairs = zip(got, expected, strict=True)
    assert all(a.confidence == pytest.approx(b.confidence, abs=CONF_ATOL) for a, b in pairs)
