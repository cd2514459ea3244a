"""When a row ends: no forward after its answer is settled, and what cuts it short."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch

from dlx.errors import PolicyError
from dlx.graphs import buffer
from dlx.graphs.buffer import BlockBuffer
from dlx.graphs.policies import POLICIES, Policy
from dlx.graphs.rules import Canvas, Keep, Within
from dlx.graphs.step import Ids, step_
from tests.graphs.test_step import MASK, STOP, L, S, Table, V, W, begin, decode

CAUSAL = [name for name, p in POLICIES.items() if p.canvas is None and p.turn is None and p.full is not True]


def scripted(draw: Random, stop: int | None = None) -> Table:
    """A network of 64 positions with few different tokens, of any sureness; from `stop` on it predicts the stop id."""
    script = [draw.choice([3, 3, 3, 4, 5]) for _ in range(S * W)]
    if stop is not None:
        script[stop] = STOP
    return Table(script, [draw.choice([2.0, 4.0, 6.0, 50.0]) for _ in script])


def known(policy: Policy, buf: BlockBuffer, row: int) -> list[int]:
    """The window's tokens that no later forward changes, the prompt's left out."""
    tok = buf.tok[row].flatten().tolist()
    if not isinstance(policy.rewrite, Keep):
        whole = [*buf.whole[row].tolist(), False]
        tok = tok[: whole.index(False) * L]
    tok = tok[: tok.index(MASK)] if MASK in tok else tok
    return [t for t, held in zip(tok, buf.held[row].flatten().tolist()) if not held]


@pytest.mark.parametrize("N", [1, 2, 4])
@pytest.mark.parametrize("name", CAUSAL)
def test_no_forward_runs_after_the_answer_is_settled(name: str, N: int) -> None:
    policy = replace(POLICIES[name], N=N)
    policy = replace(policy, select=Within(2)) if isinstance(policy.select, Within) else policy  # of blocks of 4
    draw = Random(f"{name} {N}")
    ends = set()
    for case, stop in enumerate((None, 10, 13, 14, 17, 19)):
        rows: list[dict[str, object]] = [
            {"prompt": draw.randrange(9), "max_tokens": 18 + draw.randrange(6), "accept": draw.choice([0.5, 0.9, 0.98])}
            for _ in range(4)
        ]
        net = scripted(draw, stop)
        buf, kv, out = begin(policy, rows)
        while not bool(buf.done.all()):
            running = ~buf.done
            step_(policy, Ids(MASK, V), net, buf, kv, out)
            for row in running.nonzero().flatten().tolist():
                n, _, why, _ = out[row, -buffer.FACTS :].tolist()
                told = known(policy, buf, row)
                limit, start = int(buf.ints[row, 0]), int(buf.start[row])
                room = limit - start - int(buf.held[row].sum())
                assert (why != buffer.RUNNING) == (STOP in told[:room] or len(told) >= room), (case, row)
                ends.add(why)
                if why == buffer.STOP:
                    assert out[row, n - 1] == STOP
    assert ends == {buffer.RUNNING, buffer.STOP, buffer.LENGTH}


def test_the_rest_of_a_block_is_not_waited_for() -> None:
    sharp = [50.0] * 24
    sharp[6] = sharp[7] = 3.0  # behind the stop id: one a forward
    net = Table([1, 2, 3, 4, 5, STOP, 7, 8] + [9] * 16, sharp)
    for N in (1, 2, 4):
        assert decode(replace(POLICIES["multi_bd"], N=N), net, [{}]) == [([1, 2, 3, 4, 5, STOP], 2, buffer.STOP)]
    sharp[4] = 3.0  # before it: what is undecided is waited for
    net = Table(net.script.tolist(), sharp)
    assert decode(POLICIES["single_bd"], net, [{}]) == [([1, 2, 3, 4, 5, STOP], 3, buffer.STOP)]


def test_the_positions_behind_the_limit_are_not_waited_for() -> None:
    sharp = [50.0, 50.0, 3.0, 3.0] * 6
    net = Table(list(range(1, 25)), sharp)
    assert decode(POLICIES["single_bd"], net, [{"max_tokens": 6}]) == [(list(range(1, 7)), 4, buffer.LENGTH)]


def cut(text: list[int], run: int) -> tuple[list[int], bool]:
    """A text up to where one token has stood `run` times in a row, and whether it has."""
    for end in range(run, len(text) + 1):
        if len(set(text[end - run : end])) == 1:
            return text[:end], True
    return text, False


@pytest.mark.parametrize("N", [1, 4])
def test_a_token_that_repeats_ends_the_answer_where_it_has_stood_so_often(N: int) -> None:
    plain = replace(POLICIES["multi_bd"], N=N)
    guarded = replace(plain, max_repetition_run=5)
    draw = Random(N)
    seen = dict.fromkeys((buffer.REPETITION, buffer.STOP, buffer.LENGTH), 0)
    for _ in range(52):
        net = scripted(draw, stop=draw.choice([None, 9, 14, 19]))
        rows: list[dict[str, object]] = [
            {"prompt": draw.randrange(9), "max_tokens": 8 + draw.randrange(16), "accept": draw.choice([0.5, 0.9, 0.98])}
            | {"max_repetition_run": draw.randrange(2, 7)}
            for _ in range(5)
        ]
        for row, (text, nfe, why), (whole, most, ended) in zip(
            rows, decode(guarded, net, rows), decode(plain, net, rows)
        ):
            prompt = int(row["prompt"]) % L  # type: ignore[call-overload]
            expected, worn = cut(whole[prompt:], int(row["max_repetition_run"]))  # type: ignore[call-overload]
            if worn and not (ended == buffer.STOP and expected[-1] == STOP):
                assert (text[prompt:], why) == (expected, buffer.REPETITION)
                assert nfe <= most
            else:
                assert (text, nfe, why) == (whole, most, ended)
            seen[why] += 1
    assert min(seen.values()) >= 5, seen


def test_a_budget_is_set_from_the_first_forwards() -> None:
    draw = Random(0)
    cuts = 0
    for _ in range(24):
        net = scripted(draw)
        row = {"prompt": draw.randrange(9), "max_tokens": 40, "accept": draw.choice([0.5, 0.9, 0.98])}
        policy = replace(POLICIES["multi_bd"], N=draw.choice([1, 3]))
        (_, most, _), *_ = decode(policy, net, [row])
        warm = draw.randrange(1, 7)
        policy = replace(policy, auto_max_nfe=warm)
        buf, kv, out = begin(policy, [row])
        buf.ints[0, 1] = buffer.UNLIMITED
        budget = None
        while not bool(buf.done[0]):
            step_(policy, Ids(MASK, V), net, buf, kv, out)
            if int(buf.age[0]) == warm:
                tokens = int(buf.start[0]) + int((buf.tok[0] != MASK).sum()) - int(row["prompt"])
                budget = max(warm, -(-40 * warm // max(tokens, warm)))
        assert budget is not None
        _, nfe, why, _ = out[0, -buffer.FACTS :].tolist()
        assert nfe == min(budget, most)
        assert (why == buffer.MAX_NFE) == (budget < most)
        cuts += budget < most
        _, nfe, _ = decode(policy, net, [row | {"max_nfe": most}])[0]
        assert nfe == most  # the request's own budget stays
    assert 3 <= cuts <= 21


def test_the_guard_and_the_budget_are_checked() -> None:
    for name, value in (
        ("auto_max_nfe", 0),
        ("auto_max_nfe", 1.5),
        ("max_repetition_run", 1),
        ("max_repetition_run", "9"),
    ):
        with pytest.raises(PolicyError, match=f"{name}={value!r} is not allowed"):
            Policy(**{name: value})
    with pytest.raises(PolicyError, match="does not suit a canvas"):
        replace(POLICIES["diffusion_gemma"], auto_max_nfe=8)
    assert Policy(canvas=Canvas(), max_repetition_run=9).max_repetition_run == 9


def test_columns_that_are_off_are_not_written() -> None:
    policy = POLICIES["multi_bd"]
    buf, kv, out = begin(policy, [{}])
    before = buf.ints.clone()
    version = buf.ints._version
    step_(policy, Ids(MASK, V), scripted(Random(1)), buf, kv, out)
    assert torch.equal(buf.ints, before) and buf.ints._version == version
