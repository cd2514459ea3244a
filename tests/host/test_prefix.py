"""K/V that is found gives the tokens that a cold prefill gives, and nothing is found that is not one's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from dlx import LLM, SamplingParams
from dlx.prefix import extend, following, root
from dlx.request import Output
from tests import gemma
from tests.families import FAMILIES, network, write

S = 16  # tokens a page of the nano model
IDS = Random(0).choices(range(36, 66), k=96)
LONG = SamplingParams(max_tokens=20, ignore_eos=True)


def opened(folder: Path, **more: Any) -> LLM:
    return LLM(folder, graphs="off", device="cpu", dtype="float32", **more)


def said(outputs: list[Output]) -> list[tuple[list[int], int]]:
    return [(output.token_ids, output.nfe) for output in outputs]


def at_rest(llm: LLM) -> bool:
    pool = llm.engine.scheduler.pool
    pool.check_invariants()
    return pool.used == 0 and llm.engine.idle


@pytest.fixture(scope="module")
def shared(nano: Path) -> Iterator[LLM]:
    with opened(nano, max_num_seqs=2) as llm:
        yield llm


@pytest.fixture
def fresh(shared: LLM) -> Iterator[LLM]:
    """The nano model; nothing is known before a test, and nothing held after it."""
    shared.engine.scheduler.pool.forget()
    yield shared
    assert at_rest(shared)


def hits(llm: LLM, params: SamplingParams, page: int, step: int, shift: int = 0) -> None:
    """Prompts of 1 to 3 pages behind every number of pages found answer as they do cold, and find just those."""
    pool = llm.engine.scheduler.pool
    lengths = [n for n in range(1, 3 * page + 1) if step < 16 or n % step in (0, 1, 8, 15)]
    assert len(lengths) <= llm.config.max_num_seqs, "all go together, so that none finds what another left"
    prompts = [IDS[:n] for n in lengths]
    pool.forget()
    cold = said(llm.generate(prompts, params))
    for found in range(1, 4):
        pool.forget()
        llm.generate([IDS[: found * page + shift]], replace(params, max_tokens=1))  # leaves so many pages behind
        warm = llm.generate(prompts, params)
        assert [o.cached_tokens for o in warm] == [
            min(found, (n - shift) // step * step // page) * page for n in lengths
        ]
        assert said(warm) == cold
    assert at_rest(llm)


@pytest.mark.parametrize(
    ("policy", "page", "temperature"),
    [
        ("single_bd", 16, 0.0),
        pytest.param("single_bd", 32, 1.0, marks=pytest.mark.long),
        pytest.param("multi_bd", 32, 0.0, marks=pytest.mark.slow),
        pytest.param("dmax", 32, 0.0, marks=pytest.mark.long),
    ],
)
def test_a_found_prefix_changes_no_token_at_any_offset_of_page_and_block(
    nano: Path, policy: str, page: int, temperature: float
) -> None:
    with opened(nano, policy=policy, page_size=page, max_num_seqs=24, max_model_len=128, batch_invariant=True) as llm:
        hits(llm, replace(LONG, temperature=temperature, seed=3), page, 16)


def test_a_found_prefix_changes_no_token_where_one_is_read_off_the_position_before(tmp_path: Path) -> None:
    name = "fast_dllm_v2_tied"
    write(tmp_path, name, network(name))
    more = {"max_num_seqs": 24, "max_model_len": 64, "num_pages": 200, "page_size": 8, "batch_invariant": True}
    with opened(tmp_path, policy="multi_bd", block_length=FAMILIES[name].L, **more) as llm:
        assert llm.card.shift
        hits(llm, LONG, 8, FAMILIES[name].L, shift=1)


@pytest.mark.long
def test_a_found_prefix_changes_no_token_of_a_canvas(tmp_path: Path) -> None:
    gemma.write(tmp_path, gemma.tensors(gemma.model(0, 3.0)))
    more = {"max_num_seqs": 24, "max_model_len": 64, "num_pages": 200, "page_size": 8, "batch_invariant": True}
    with opened(tmp_path, **more) as llm:
        hits(llm, replace(LONG, temperature=1.0, seed=5), 8, 1)


def test_the_next_turn_finds_what_was_answered(fresh: LLM) -> None:
    prompt, params = IDS[:20], replace(LONG, max_tokens=60)
    (answer,) = fresh.generate([prompt], params)
    further = [*prompt, *answer.token_ids, *IDS[:9]]
    (warm,) = fresh.generate([further], params)
    assert warm.cached_tokens >= 64  # of 80: the last block has no final K/V, for nothing came behind it
    fresh.engine.scheduler.pool.forget()
    assert said(fresh.generate([further], params)) == said([warm])


def test_another_salt_or_adapter_finds_nothing(fresh: LLM) -> None:
    for salt, found in (("", 0), ("a", 0), ("a", 2), ("b", 0), ("", 2), ("ab", 0)):
        (out,) = fresh.generate([IDS[:40]], replace(LONG, cache_salt=salt))
        assert out.cached_tokens == found * S
    assert len({root("", None), root("a", None), root("", "a"), root("a", "a"), root("aa", "")}) == 5


def test_a_digest_depends_on_all_that_came_before() -> None:
    chains: list[list[bytes]] = []
    for ids in ([1, 2, 3, 4], [1, 2, 3, 5], [9, 2, 3, 4]):
        digests: list[bytes] = []
        extend(digests, root("", None), ids, 2)
        chains.append(digests)
    assert chains[0][0] == chains[1][0] != chains[2][0]
    assert len({chain[1] for chain in chains}) == 3
    assert chains[0][1] == following(following(root("", None), [1, 2]), [3, 4])


def test_what_was_aborted_in_its_prefill_is_not_found(nano: Path) -> None:
    with opened(nano, max_num_batched_tokens=64) as llm:
        prompt, engine = [IDS[n % 96] for n in range(200)], llm.engine
        (number,) = engine.add_all([(prompt, LONG)])
        engine.step()
        (request,) = engine.scheduler.running.values()
        assert (request.filled, request.decodes) == (64, False)
        engine.abort(number)
        assert engine.idle and engine.scheduler.pool.cached == 0
        after = llm.generate([prompt], LONG)
        assert after[0].cached_tokens == 0
    with opened(nano) as other:
        assert said(other.generate([prompt], LONG)) == said(after)


def test_of_an_aborted_answer_only_what_left_the_window_is_found(fresh: LLM) -> None:
    engine, prompt = fresh.engine, IDS[:20]
    (number,) = engine.add_all([(prompt, replace(LONG, max_tokens=100, threshold=0.0))])
    for _ in range(4):
        engine.step()
    (request,) = engine.scheduler.running.values()
    known, final = prompt + request.out, request.final
    engine.abort(number)
    assert 16 < final < len(known)  # the last block that was delivered has no final K/V yet
    (out,) = fresh.generate([[*known, *IDS[:9]]], LONG)
    assert out.cached_tokens == final


def test_without_the_cache_nothing_is_found_and_nothing_kept(nano: Path) -> None:
    with opened(nano, prefix_caching=False) as llm:
        assert [llm.generate([IDS], LONG)[0].cached_tokens for _ in range(2)] == [0, 0]
        pool, scheduler = llm.engine.scheduler.pool, llm.engine.scheduler
        assert (pool.cached, scheduler.prefix_queries, scheduler.prefix_hits) == (0, 0, 0)


def test_hits_are_counted_in_tokens(fresh: LLM) -> None:
    s = fresh.engine.scheduler
    before = s.prefix_queries, s.prefix_hits
    for _ in range(3):
        fresh.generate([IDS[:40]], LONG)
    assert (s.prefix_queries - before[0], s.prefix_hits - before[1]) == (120, 64)


def test_what_a_page_held_before_never_shows(nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that are blank hold NaN, in a pool in which every page is handed out again and again."""
    draw = Random(1)
    prompts = [IDS[: draw.randint(1, 60)] for _ in range(14)]
    params = [
        replace(LONG, max_tokens=draw.randint(30, 110), threshold=0.3, cache_salt=draw.choice("ab")) for _ in prompts
    ]
    more = {"max_num_seqs": 4, "max_model_len": 176, "batch_invariant": True}
    with opened(nano, **more) as llm:
        clean = said(llm.generate(prompts, params))
    with opened(nano, num_pages=12, **more) as llm:
        worker, pool, launch = llm.engine.worker, llm.engine.scheduler.pool, llm.engine.worker.launch

        def poisoned(plan: Any) -> None:
            kept = torch.tensor(sorted({*pool.holders(), *pool._idle}))
            for kv in worker.kv:
                blank = torch.ones(kv.shape[1], dtype=torch.bool)
                blank[kept] = False
                kv[:, blank] = float("nan")
            launch(plan)

        monkeypatch.setattr(worker, "launch", poisoned)
        for kv in worker.kv:
            kv.fill_(float("nan"))
        assert said(llm.generate(prompts, params)) == clean
        assert llm.engine.scheduler.preemptions and llm.engine.scheduler.prefix_hits
