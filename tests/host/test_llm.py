"""Prompts in every form, answers in their order, and the same answer in whatever company and at whatever pace."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dlx import LLM, EngineError, Output, RequestError, SamplingParams
from dlx.request import Finish

L = 16
LONG = SamplingParams(max_tokens=64, ignore_eos=True)
CHAT = [{"role": "user", "content": "Repeat: apple pear plum"}]


class Said(NamedTuple):
    """All of an output that does not depend on the clock and the order of arrival."""

    text: str
    token_ids: list[int]
    finish: Finish
    tokens: int
    nfe: int
    prefills: int


def said(output: Output) -> Said:
    return Said(
        output.text, output.token_ids, output.finish_reason, output.tokens, output.nfe, output.prefill_forwards
    )


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
            max_tokens=draw.randint(1, 50),
            temperature=draw.choice([0.0, 0.0, 0.4, 1.0]),
            seed=draw.getrandbits(60),
            threshold=draw.choice([None, 0.0, 0.3, 0.6, 1.0]),
            open_at=draw.choice([None, 0.5]),
            force_at=draw.choice([None, 0.2, 1.0]),
            max_nfe=draw.choice([None, None, 3, 9]),
            ignore_eos=draw.random() < 0.5,
            stop_token_ids=draw.choice([(), (19, 202)]),
        )

    return [(prompt, params()) for prompt in prompts(n, seed=n)]


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


def test_progress_is_shown_on_request_and_on_stderr_alone(
    nano_llm: LLM, capfd: pytest.CaptureFixture[str]
) -> None:
    nano_llm.generate(["a", "b"], LONG)
    assert capfd.readouterr() == ("", "")
    nano_llm.generate(["a", "b"], LONG, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "prompts" in err


def test_an_output_counts_and_decodes_what_it_says(four: LLM) -> None:
    requests = mixed(40)
    for (prompt, params), out in zip(requests, four.generate(*zip(*requests))):
        stopped = out.finish_reason is Finish.STOP
        assert out.prompt_token_ids == prompt
        assert out.text == four.tokenizer.decode(out.token_ids)
        assert out.tokens == len(out.token_ids) + stopped <= params.max_tokens
        assert four.card.mask_id not in out.token_ids
        assert 1 <= out.nfe <= (params.max_nfe or 999)
        assert out.prefill_forwards == (1 if len(prompt) >= L else 0)
        assert out.tokens_per_forward == out.tokens / out.nfe
        assert 0 <= out.timings.admitted_s <= out.timings.first_block_s <= out.timings.total_s
        if not stopped:
            assert out.finish_reason is (Finish.LENGTH if out.tokens == params.max_tokens else Finish.MAX_NFE)
        assert stopped or params.ignore_eos or not {2, *params.stop_token_ids} & set(out.token_ids)


def test_requests_get_the_same_in_company_as_alone(four: LLM) -> None:
    requests = mixed(64)
    assert together(four, requests) == alone(four, requests)
    assert at_rest(four)


def test_requests_wait_for_pages_and_get_the_same(four: LLM, nano: Path) -> None:
    requests = mixed(16)
    few = max(-(-(len(prompt) + params.max_tokens) // L) for prompt, params in requests)
    policy = four.config.policy
    with LLM(nano, policy=policy, graphs="off", device="cpu", max_num_seqs=4, num_pages=few) as narrow:
        assert together(narrow, requests) == together(four, requests)
        assert at_rest(narrow)


def test_reading_a_launch_late_changes_nothing(four: LLM, nano: Path) -> None:
    requests = mixed(24)
    with LLM(nano, policy=four.config.policy, graphs="off", device="cpu", max_num_seqs=4) as late:
        late.engine.lag = 1  # as on a GPU: launch t + 1 is sent before t is read
        for _ in range(2):
            assert together(late, requests) == together(four, requests)
        assert at_rest(late)


@pytest.mark.parametrize("n", [1, L - 1, L, L + 1])
def test_an_answer_is_cut_at_exactly_max_tokens(four: LLM, n: int) -> None:
    many = [[72] * size for size in range(1, 2 * L + 1)]
    whole = four.generate(many, replace(LONG, max_tokens=3 * L))
    for short, long in zip(four.generate(many, replace(LONG, max_tokens=n)), whole):
        assert (short.tokens, short.finish_reason) == (n, Finish.LENGTH)
        assert short.token_ids == long.token_ids[:n]


@pytest.mark.parametrize("most", [1, 2, 3, 5, 8])
def test_spent_forwards_leave_the_decided_beginning(four: LLM, most: int) -> None:
    params = replace(LONG, threshold=1.0)  # a token a block and forward
    for prompt in prompts(6):
        whole, cut = one(four, prompt, params), one(four, prompt, replace(params, max_nfe=most))
        assert (cut.finish, cut.nfe) == (Finish.MAX_NFE, most)
        assert cut.tokens == len(cut.token_ids) <= most * four.policy.N
        assert cut.token_ids == whole.token_ids[: cut.tokens]


def test_an_answer_ends_before_a_stop_id_inside_a_block(four: LLM) -> None:
    inside = 0
    for prompt in prompts(12):
        ids = one(four, prompt, LONG).token_ids
        ends = [at for at, tok in enumerate(ids) if tok != 2 and tok not in ids[:at] and 2 not in ids[:at]]
        inside += sum(0 < (len(prompt) + at) % L < L - 1 for at in ends)
        for at in ends:
            cut = one(four, prompt, SamplingParams(max_tokens=64, stop_token_ids=(ids[at],)))
            assert (cut.token_ids, cut.tokens, cut.finish) == (ids[:at], at + 1, Finish.STOP)
    assert inside > 10


def test_ignore_eos_goes_on_past_the_stop_id_and_keeps_it(nano_llm: LLM) -> None:
    stopped = one(nano_llm, CHAT, SamplingParams(max_tokens=64))
    onward = one(nano_llm, CHAT, LONG)
    assert stopped.finish is Finish.STOP
    assert (onward.tokens, onward.finish) == (64, Finish.LENGTH)
    assert onward.token_ids[: stopped.tokens] == [*stopped.token_ids, 2]
    assert onward.text == nano_llm.tokenizer.decode(onward.token_ids)
    assert "<|" not in onward.text


def test_every_request_of_a_batch_has_its_own_threshold(four: LLM) -> None:
    requests = [(prompts(1)[0], replace(LONG, threshold=t)) for t in (0.0, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0)]
    batch = together(four, requests)
    assert batch == alone(four, requests)
    assert [out.nfe for out in batch] == sorted(out.nfe for out in batch)
    assert batch[0].nfe < batch[-1].nfe


def test_a_seed_fixes_the_draws_and_another_changes_them(nano_llm: LLM) -> None:
    drawn = [one(nano_llm, CHAT, replace(LONG, temperature=1.0, seed=seed)) for seed in (7, 8, 7, 2**62 + 7)]
    assert drawn[0] == drawn[2]
    assert len({out.text for out in drawn}) == 3
    assert drawn[0] != one(nano_llm, CHAT, LONG)
    fresh = nano_llm.generate([CHAT] * 3, replace(LONG, temperature=1.0))
    assert len({out.text for out in fresh}) == 3


def test_without_temperature_the_seed_is_nothing(nano_llm: LLM) -> None:
    assert one(nano_llm, CHAT, replace(LONG, seed=1)) == one(nano_llm, CHAT, replace(LONG, seed=2))


def test_a_closed_model_says_so_and_may_be_closed_again(nano: Path) -> None:
    with LLM(nano, graphs="off", device="cpu") as llm:
        assert llm.generate("a", SamplingParams(max_tokens=1))[0].tokens == 1
    llm.close()
    for use in (lambda: llm.generate("a"), lambda: next(llm.stream("a")), lambda: llm.card, lambda: llm.tokenizer):
        with pytest.raises(EngineError, match="closed; build a new one"):
            use()


def test_a_generation_that_is_interrupted_leaves_nothing_behind(
    four: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = one(four, CHAT)
    turns = iter([four.engine.step] * 2)
    monkeypatch.setattr(four.engine, "step", lambda watch=False: next(turns)(watch))  # the third turn raises
    with pytest.raises(StopIteration):
        four.generate([[72]] * 6, LONG)
    monkeypatch.undo()
    assert at_rest(four)
    assert one(four, CHAT) == before
