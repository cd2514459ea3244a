"""Prompts in every form, answers in their order, and the same answer in whatever company and at whatever pace."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dlx import LLM, EngineError, Output, RequestError, SamplingParams
from dlx.request import Finish

L = 16
LONG = SamplingParams(max_tokens=40, ignore_eos=True)
CHAT = [{"role": "user", "content": "Repeat: apple pear plum"}]


class Said(NamedTuple):
    """All of an output that does not depend on the clock, the order of arrival and what was prefilled before."""

    text: str
    token_ids: list[int]
    finish: Finish
    tokens: int
    nfe: int


def said(output: Output) -> Said:
    return Said(output.text, output.token_ids, output.finish_reason, output.tokens, output.nfe)


def one(llm: LLM, prompt: Any, params: SamplingParams | None = None) -> Said:
    (output,) = llm.generate(prompt, params)
    return said(output)


def prompts(n: int, seed: int = 0) -> list[list[int]]:
    """Chats of random printable bytes, of 1 to 40 tokens each."""
    draw = random.Random(seed)
    return [[1, 267, 202, *draw.choices(range(36, 99), k=draw.randint(0, 37))] for _ in range(n)]


def mixed(n: int) -> list[tuple[list[int], SamplingParams]]:
    """Requests that differ in prompt, length, temperature, seed, thresholds, budget and stop ids."""
    draw = random.Random(n)

    def params() -> SamplingParams:
        return SamplingParams(
            max_tokens=draw.randint(1, 24),
            temperature=draw.choice([0.0] * 4 + [0.4, 1.0, 50.0]),  # the last draws bytes that are no text
            seed=draw.getrandbits(60),
            threshold=draw.choice([None, 0.0, 0.3, 0.6, 1.0]),
            open_at=draw.choice([None, 0.5]),
            force_at=draw.choice([None, 0.2, 1.0]),
            max_nfe=draw.choice([None, None, 3, 9]),
            ignore_eos=draw.random() < 0.5,
            stop_token_ids=draw.choice([(), (19, 202)]),
        )

    return [(prompt, params()) for prompt in prompts(n, seed=n)]


REQUESTS = mixed(64)


def alone(llm: LLM, requests: list[tuple[list[int], SamplingParams]]) -> list[Said]:
    return [one(llm, prompt, params) for prompt, params in requests]


def together(llm: LLM, requests: list[tuple[list[int], SamplingParams]]) -> list[Said]:
    return [said(out) for out in llm.generate([p for p, _ in requests], [p for _, p in requests])]


def at_rest(llm: LLM) -> bool:
    pool = llm.engine.scheduler.pool
    pool.check_invariants()
    return llm.engine.idle and pool.free == pool.total


@pytest.fixture(scope="module", params=["single_bd", "multi_bd"])
def four(request: pytest.FixtureRequest, nano: Path) -> Iterator[LLM]:
    """The nano model with four slots, by either policy."""
    with LLM(nano, policy=request.param, graphs="off", device="cpu", max_num_seqs=4) as llm:
        yield llm


@pytest.fixture(scope="module")
def solo(four: LLM) -> list[Said]:
    """What each request gets alone."""
    return alone(four, REQUESTS)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(nano_llm: LLM) -> Iterator[None]:
    yield
    assert at_rest(nano_llm)


def test_a_prompt_is_text_ids_or_messages(nano_llm: LLM) -> None:
    ids = nano_llm.tokenizer.encode("12 + 7 =")
    assert nano_llm.generate("12 + 7 =")[0].prompt_token_ids == ids
    assert one(nano_llm, "12 + 7 =") == one(nano_llm, ids) == one(nano_llm, tuple(ids))
    assert nano_llm.generate(CHAT)[0].prompt_token_ids == nano_llm.tokenizer.chat(CHAT)


@pytest.mark.parametrize("wrap", [list, tuple])
def test_a_list_holds_prompts_of_any_form_and_answers_keep_its_order(nano_llm: LLM, wrap: type) -> None:
    many = ["one", [72, 73, 74], CHAT, "two", CHAT, [19]]
    outputs = nano_llm.generate(wrap(many), replace(LONG, max_tokens=20))
    assert [said(out) for out in outputs] == [one(nano_llm, p, replace(LONG, max_tokens=20)) for p in many]
    expected = [nano_llm.tokenizer.encode("one"), many[1], nano_llm.tokenizer.chat(CHAT)]
    assert [out.prompt_token_ids for out in outputs[:3]] == expected


def test_lists_of_one_kind_are_lists_of_prompts(nano_llm: LLM) -> None:
    for many in (["a"], ["a", "b"], [[5, 6]], [[5], [6], [7]], [CHAT], [CHAT, CHAT]):
        assert len(nano_llm.generate(many, SamplingParams(max_tokens=2))) == len(many)


def test_no_prompts_get_no_answers(nano_llm: LLM) -> None:
    assert nano_llm.generate([]) == nano_llm.generate((), []) == []


def test_parameters_are_one_for_all_or_one_a_prompt(nano_llm: LLM) -> None:
    each = [replace(LONG, max_tokens=n) for n in (3, 30, 11)]
    assert [out.tokens for out in nano_llm.generate(["a", "b", "c"], each)] == [3, 30, 11]
    assert [out.tokens for out in nano_llm.generate(["a", "b", "c"], tuple(each))] == [3, 30, 11]
    assert [out.tokens for out in nano_llm.generate(["a", "b"], each[2])] == [11, 11]
    for params in (each, each[:1], []):
        with pytest.raises(RequestError, match=f"{len(params)} sampling parameters for 2 prompts; pass one"):
            nano_llm.generate(["a", "b"], params)


def test_progress_is_shown_on_request_and_on_stderr_alone(nano_llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    nano_llm.generate(["a", "b"], LONG)
    assert capfd.readouterr() == ("", "")
    nano_llm.generate(["a", "b"], LONG, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "prompts" in err


def test_an_output_counts_and_decodes_what_it_says(four: LLM) -> None:
    for (prompt, params), out in zip(REQUESTS, four.generate(*map(list, zip(*REQUESTS)))):
        stopped = out.finish_reason is Finish.STOP
        assert out.prompt_token_ids == prompt
        assert out.text == four.tokenizer.decode(out.token_ids)
        assert out.tokens == len(out.token_ids) + stopped <= params.max_tokens
        assert four.card.mask_id not in out.token_ids
        assert 1 <= out.nfe <= (params.max_nfe or 999)
        assert out.prefill_forwards == (1 if len(prompt) // L * L > out.cached_tokens else 0)
        assert out.tokens_per_forward == out.tokens / out.nfe
        assert 0 <= out.timings.admitted_s <= out.timings.first_block_s <= out.timings.total_s
        assert stopped or params.ignore_eos or not {2, *params.stop_token_ids} & set(out.token_ids)
        if not stopped:
            assert out.finish_reason is (Finish.LENGTH if out.tokens == params.max_tokens else Finish.MAX_NFE)


def test_timings_tell_waiting_from_decoding(four: LLM) -> None:
    *first, last = [out.timings for out in four.generate([[72]] * 5, replace(LONG, threshold=1.0))]
    for times in (*first, last):
        assert 0 < times.admitted_s < times.first_block_s < times.total_s
    assert all(last.admitted_s > times.first_block_s for times in first)


def test_requests_get_the_same_in_company_as_alone(four: LLM, solo: list[Said]) -> None:
    assert together(four, REQUESTS) == solo
    assert at_rest(four)


def test_requests_wait_for_pages_and_get_the_same(four: LLM, solo: list[Said], nano: Path) -> None:
    few = max(-(-(len(prompt) + params.max_tokens) // L) for prompt, params in REQUESTS)
    policy = four.config.policy
    with LLM(nano, policy=policy, graphs="off", device="cpu", max_num_seqs=4, num_pages=few) as narrow:
        assert together(narrow, REQUESTS[:20]) == solo[:20]
        assert at_rest(narrow)


def test_reading_a_launch_late_changes_nothing(four: LLM, solo: list[Said], nano: Path) -> None:
    with LLM(nano, policy=four.config.policy, graphs="off", device="cpu", max_num_seqs=4) as late:
        late.engine.lag = 1  # as on a GPU: launch t + 1 is sent before t is read
        for part in (slice(0, 10), slice(10, 24)):
            assert together(late, REQUESTS[part]) == solo[part]
        assert at_rest(late)


def test_an_answer_is_cut_at_exactly_max_tokens(four: LLM) -> None:
    many = [[72] * size for size in range(4, 4 + L)]
    whole = four.generate(many, replace(LONG, max_tokens=L + 2))
    for n in (1, L - 1, L, L + 1):
        for short, long in zip(four.generate(many, replace(LONG, max_tokens=n)), whole):
            assert (short.tokens, short.finish_reason) == (n, Finish.LENGTH)
            assert short.token_ids == long.token_ids[:n]


def test_a_row_may_be_filled_to_its_last_position(four: LLM, nano: Path) -> None:
    policy = four.config.policy
    with LLM(nano, policy=policy, graphs="off", device="cpu", max_model_len=37, page_size=32) as short:
        for n in (1, 5, 16, 36):
            params = replace(LONG, max_tokens=37 - n)
            assert one(short, [72] * n, params) == one(four, [72] * n, params)
    (output,) = four.generate([[72] * 2030], replace(LONG, max_tokens=18, threshold=0.0))
    assert (output.tokens, output.finish_reason) == (18, Finish.LENGTH)


def test_spent_forwards_leave_the_decided_beginning(four: LLM) -> None:
    params = replace(LONG, max_tokens=20, threshold=1.0)  # a token a block and forward
    for prompt in prompts(3):
        whole, *cut = together(four, [(prompt, replace(params, max_nfe=n)) for n in (99, 1, 2, 3, 5, 8)])
        assert [out.nfe for out in cut] == [1, 2, 3, 5, 8]
        for out in cut:
            assert out.finish is Finish.MAX_NFE
            assert out.tokens == len(out.token_ids) <= out.nfe * four.policy.N
            assert out.token_ids == whole.token_ids[: out.tokens]


def test_the_last_allowed_forward_may_still_end_the_answer(four: LLM) -> None:
    whole = one(four, CHAT, LONG)
    assert one(four, CHAT, replace(LONG, max_nfe=whole.nfe)) == whole
    assert one(four, CHAT, replace(LONG, max_nfe=whole.nfe - 1)).finish is Finish.MAX_NFE


def test_filters_are_a_setting_for_any_policy(nano: Path) -> None:
    one = SamplingParams(max_tokens=24, temperature=1.0, top_k=1, ignore_eos=True)
    with LLM(nano, graphs="off", filters=True) as llm:
        assert llm.policy.filters
        first, second = (llm.generate("Qwerty asdf", replace(one, seed=seed))[0].token_ids for seed in (1, 2))
    assert len(first) == 24 and first == second


def test_an_answer_ends_before_a_stop_id_inside_a_block(four: LLM) -> None:
    inside = 0
    for prompt in prompts(3, seed=1):
        ids = one(four, prompt, LONG).token_ids
        ids = ids[: ids.index(2)] if 2 in ids else ids
        ends = [at for at, tok in enumerate(ids) if tok not in ids[:at]]
        inside += sum(0 < (len(prompt) + at) % L < L - 1 for at in ends)
        stops = [SamplingParams(max_tokens=40, stop_token_ids=(ids[at],)) for at in ends]
        for at, cut in zip(ends, together(four, [(prompt, stop) for stop in stops])):
            assert (cut.token_ids, cut.tokens, cut.finish) == (ids[:at], at + 1, Finish.STOP)
    assert inside > 10


def test_ignore_eos_goes_on_past_the_stop_id_and_keeps_it(llm: LLM) -> None:
    sums: list[Any] = [[{"role": "user", "content": f"What is {n} + 4?"}] for n in (3, 12, 25)]
    stopped = llm.generate(sums, SamplingParams(max_tokens=40))
    for short, long in zip(stopped, llm.generate(sums, LONG)):
        assert (short.finish_reason, long.finish_reason) == (Finish.STOP, Finish.LENGTH)
        assert short.tokens < long.tokens == len(long.token_ids) == 40
        assert long.token_ids[: short.tokens] == [*short.token_ids, 2]
        assert short.text == llm.tokenizer.decode(short.token_ids)
        assert long.text == llm.tokenizer.decode(long.token_ids)
        assert "<|" not in long.text


def test_every_request_of_a_batch_has_its_own_threshold(four: LLM) -> None:
    requests = [(prompts(1)[0], replace(LONG, threshold=t)) for t in (0.0, 0.3, 0.6, 0.9, 1.0)]
    batch = together(four, requests)
    assert batch == alone(four, requests)
    assert batch[0].nfe < batch[-1].nfe


def test_a_seed_fixes_the_draws_and_another_changes_them(nano_llm: LLM) -> None:
    drawn = [one(nano_llm, CHAT, replace(LONG, temperature=1.0, seed=seed)) for seed in (7, 8, 7, 2**62 + 7)]
    assert drawn[0] == drawn[2]
    assert len({out.text for out in drawn}) == 3
    assert drawn[0] != one(nano_llm, CHAT, LONG)
    fresh = nano_llm.generate([CHAT] * 12, replace(LONG, temperature=1.0))
    assert len({out.text for out in fresh}) > 1


def test_without_temperature_the_seed_is_nothing(nano_llm: LLM) -> None:
    assert one(nano_llm, CHAT, replace(LONG, seed=1)) == one(nano_llm, CHAT, replace(LONG, seed=2))


def test_a_closed_model_says_so_and_may_be_closed_again(nano: Path) -> None:
    with LLM(nano, graphs="off", device="cpu") as llm:
        assert llm.generate("a", SamplingParams(max_tokens=1))[0].tokens == 1
    llm.close()
    for use in (lambda: llm.generate("a"), lambda: next(llm.stream("a")), lambda: llm.card, lambda: llm.tokenizer):
        with pytest.raises(EngineError, match="closed; build a new one"):
            use()


def test_a_generation_that_is_interrupted_leaves_nothing_behind(four: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    before = one(four, CHAT)
    turns = iter([four.engine.step] * 2)
    monkeypatch.setattr(four.engine, "step", lambda: next(turns)())  # the third turn raises
    with pytest.raises(StopIteration):
        four.generate([[72]] * 6, LONG)
    monkeypatch.undo()
    assert at_rest(four)
    assert one(four, CHAT) == before
