"""The reference decoder itself, held against cases worked out by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.checkpoints import ZOO, write
from tests.reference import Ask, Decoded, Forward, Qwen3, Strategy, compare, decode

MASK = 3
VOCAB = 100
PAST = 7  # every prompt token
WEAK = 0.2  # the confidence of a position the script does not name


@dataclass
class Scripted:
    """A network that says token 10 + p at position p, with the confidences of a script.

    A script gives a position one confidence, or one a forward (the last of them from then on).
    """

    script: dict[int, float | list[float]] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    mask_id: int = MASK
    vocab: int = VOCAB
    calls: list[list[int]] = field(default_factory=list)

    def __call__(self, ids: list[int], rows: list[int]) -> Tensor:
        logits = torch.full((len(rows), VOCAB + 8), 50.0)  # the mask id and the padding would win if they could
        for row, pos in enumerate(rows):
            conf = self.script.get(pos, WEAK)
            if isinstance(conf, list):
                conf = conf[min(len(self.calls), len(conf) - 1)]
            logits[row, :VOCAB] = math.log((1 - conf) / (VOCAB - 2))
            logits[row, MASK] = 50.0
            logits[row, self.tokens.get(pos, 10 + pos)] = math.log(conf)
        self.calls.append(ids)
        return logits


def run(network: Scripted, n_prompt: int, strategy: Strategy, ask: Ask) -> Decoded:
    return decode(network, [PAST] * n_prompt, strategy, ask)


def written(decoded: Decoded) -> list[list[int]]:
    return [sorted(forward.wrote) for forward in decoded.forwards]


def windows(decoded: Decoded) -> list[tuple[int, int, int]]:
    return [(f.base, f.opened, f.lead) for f in decoded.forwards]


def sure(*positions: int) -> dict[int, float | list[float]]:
    return dict.fromkeys(positions, 0.95)


def test_all_above_the_threshold_are_accepted_together_and_else_the_best() -> None:
    network = Scripted({4: 0.95, 5: 0.3, 6: 0.92, 7: 0.4})
    out = run(network, 4, Strategy(4), Ask(4))
    assert written(out) == [[4, 6], [7], [5]]
    assert [f.forced for f in out.forwards] == [[], [1], [1]]
    assert (out.tokens, out.finish, out.nfe, out.age) == ([14, 15, 16, 17], "length", 3, [0, 2, 0, 1])


def test_a_confidence_equal_to_the_threshold_is_refused_and_ties_go_to_the_lowest_position() -> None:
    class Even(Scripted):
        def __call__(self, ids: list[int], rows: list[int]) -> Tensor:
            logits = torch.full((len(rows), VOCAB), -math.inf)
            logits[:, [8, 9]] = 0.0
            return logits

    out = run(Even(), 4, Strategy(4, threshold=0.5), Ask(4))
    assert written(out) == [[4], [5], [6], [7]]
    assert out.tokens == [8, 8, 8, 8]  # two tokens are equally probable: the lowest id
    assert [f.tau_gap for f in out.forwards] == [0.0] * 4
    assert [f.best_gap for f in out.forwards] == [0.0, 0.0, 0.0, math.inf]
    assert [f.token_gap for f in out.forwards] == [0.0] * 4


def test_the_mask_id_and_padding_are_neither_chosen_nor_in_the_denominator() -> None:
    out = run(Scripted({4: 0.7}), 4, Strategy(4, threshold=0.6), Ask(4))
    assert out.forwards[0].wrote == {4: 14}
    assert out.forwards[0].tau_gap == pytest.approx(0.1, abs=1e-6)


def test_the_tail_of_a_prompt_joins_the_first_block_and_is_not_delivered() -> None:
    network = Scripted(sure(6, 7))
    out = run(network, 6, Strategy(4), Ask(2))
    assert network.calls == [[PAST] * 6 + [MASK] * 2]
    assert out.tokens == [16, 17]
    assert windows(out) == [(1, 1, 0)]


def test_a_prompt_shorter_than_a_block_starts_in_block_0() -> None:
    out = run(Scripted(sure(2, 3)), 2, Strategy(4), Ask(2))
    assert (out.tokens, windows(out)) == ([12, 13], [(0, 1, 0)])


def test_a_whole_block_is_final_in_the_forward_that_opens_the_next() -> None:
    network = Scripted(sure(*range(4, 16)))
    out = run(network, 4, Strategy(4), Ask(12))
    assert windows(out) == [(1, 1, 0), (1, 2, 1), (2, 2, 1)]
    assert written(out) == [[4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert network.calls[1] == [PAST] * 4 + [14, 15, 16, 17] + [MASK] * 4


def test_single_bd_opens_no_block_before_the_last_is_whole() -> None:
    out = run(Scripted(sure(4, 5, 6)), 4, Strategy(4), Ask(8))
    assert windows(out)[:3] == [(1, 1, 0), (1, 1, 0), (1, 2, 1)]


def test_single_bd_stays_at_one_decoding_block_whatever_open_at_is() -> None:
    out = run(Scripted(), 4, Strategy(4, open_at=0.0), Ask(8))
    assert [f.opened - f.lead for f in out.forwards] == [1] * 8


def test_the_next_block_opens_in_the_forward_after_its_share_is_reached() -> None:
    out = run(Scripted(sure(4, 8)), 4, Strategy(4, N=2, open_at=0.5), Ask(12))
    assert windows(out)[:3] == [(1, 1, 0), (1, 1, 0), (1, 2, 0)]


def test_a_prompts_tail_counts_as_filled_when_a_block_is_opened() -> None:
    out = run(Scripted(), 6, Strategy(4, N=2, open_at=0.5), Ask(12))
    assert windows(out)[0] == (1, 2, 0)


def test_one_forward_opens_one_block_and_no_more_than_there_is_room_for() -> None:
    out = run(Scripted(), 4, Strategy(4, N=3, open_at=0.0), Ask(40, max_nfe=5))
    assert windows(out) == [(1, 2, 0), (1, 3, 0), (1, 3, 0), (1, 3, 0), (1, 4, 1)]


def test_a_leading_whole_block_leaves_room_for_one_more_and_then_slides_out() -> None:
    out = run(Scripted(sure(4, 5, 6, 7)), 4, Strategy(4, N=2, open_at=0.0), Ask(40, max_nfe=3))
    assert windows(out) == [(1, 2, 0), (1, 3, 1), (2, 2, 0)]


def test_several_leading_whole_blocks_slide_out_together() -> None:
    network = Scripted(sure(*range(8, 16)) | {4: 0.95, 5: [0.1, 0.95], 6: [0.1, 0.95], 7: [0.1, 0.95]})
    out = run(network, 4, Strategy(4, N=4, open_at=0.0, force_at=1.0), Ask(40, max_nfe=3))
    assert written(out)[:2] == [[4, 8, 9, 10, 11], [5, 6, 7, 12, 13, 14, 15]]
    assert windows(out)[2] == (1, 4, 3)
    assert out.tokens == [10 + p for p in range(4, 17)]


def test_no_block_opens_past_the_limit() -> None:
    out = run(Scripted(), 4, Strategy(4, N=4, open_at=0.0), Ask(6, max_nfe=4))
    assert windows(out) == [(1, 2, 0)] * 4


def test_a_block_is_not_forced_before_the_block_before_is_far_enough() -> None:
    network = Scripted({4: [0.1, 0.1, 0.95, 0.95], 5: [0.1, 0.1, 0.95], 6: [0.1, 0.95]})
    out = run(network, 4, Strategy(4, N=2, open_at=0.0, force_at=0.75), Ask(8))
    assert [f.forced for f in out.forwards[:4]] == [[1], [], [], [2]]
    assert written(out)[:4] == [[7], [6], [4, 5], [8]]


def test_a_block_may_be_forced_by_progress_before_the_forward_only() -> None:
    network = Scripted(sure(4, 5, 6, 7))
    out = run(network, 4, Strategy(4, N=2, open_at=0.0, force_at=0.5), Ask(8))
    assert (written(out)[0], out.forwards[0].forced) == ([4, 5, 6, 7], [])
    assert out.forwards[1].forced == [2]


def test_an_answer_is_cut_at_max_tokens_within_a_block() -> None:
    out = run(Scripted(sure(*range(4, 12))), 4, Strategy(4), Ask(5))
    assert (out.tokens, out.finish, out.nfe) == ([14, 15, 16, 17, 18], "length", 2)


def test_a_stop_id_ends_the_answer_and_is_delivered() -> None:
    network = Scripted(sure(*range(4, 12)), tokens={9: 2})
    out = run(network, 4, Strategy(4), Ask(40, stop_ids=frozenset({2, 60})))
    assert (out.tokens, out.finish, out.nfe) == ([14, 15, 16, 17, 18, 2], "stop", 2)
    assert out.kept() == [14, 15, 16, 17, 18]


def test_a_stop_id_past_the_limit_does_not_count() -> None:
    network = Scripted(sure(*range(4, 12)), tokens={6: 2})
    assert run(network, 4, Strategy(4), Ask(2, stop_ids=frozenset({2}))).finish == "length"
    assert run(network, 4, Strategy(4), Ask(3, stop_ids=frozenset({2}))).finish == "stop"


def test_a_stop_id_waits_until_the_blocks_before_are_whole() -> None:
    network = Scripted(sure(8, 9, 10, 11), tokens={8: 2})
    out = run(network, 4, Strategy(4, N=2, open_at=0.0), Ask(40, stop_ids=frozenset({2})))
    assert (out.nfe, out.tokens) == (4, [14, 15, 16, 17, 2])


def test_stop_ids_of_the_prompt_and_ignored_ones_do_not_count() -> None:
    network = Scripted(sure(*range(6, 12)), tokens={9: 2})
    ask = Ask(6, stop_ids=frozenset({2, PAST}), ignore_eos=True)
    assert run(network, 6, Strategy(4), ask).tokens == [16, 17, 18, 2, 20, 21]
    assert run(network, 6, Strategy(4), Ask(6, stop_ids=frozenset({PAST}))).finish == "length"


def test_a_spent_budget_delivers_the_leading_run_of_tokens() -> None:
    network = Scripted(sure(4, 5, 7))
    out = run(network, 4, Strategy(4), Ask(40, max_nfe=1))
    assert (out.tokens, out.finish, out.nfe) == ([14, 15], "max_nfe", 1)
    assert run(Scripted(sure(5)), 4, Strategy(4), Ask(40, max_nfe=1)).tokens == []


def test_the_leading_run_follows_whole_blocks_and_is_cut_alike() -> None:
    network = Scripted(sure(*range(4, 11)))
    assert run(network, 4, Strategy(4), Ask(40, max_nfe=2)).tokens == [10 + p for p in range(4, 11)]
    out = run(Scripted(sure(4, 5), tokens={5: 2}), 4, Strategy(4), Ask(40, 1, frozenset({2})))
    assert (out.tokens, out.finish) == ([14, 2], "stop")
    out = run(Scripted(sure(4, 5)), 4, Strategy(4), Ask(2, max_nfe=1))
    assert (out.tokens, out.finish) == ([14, 15], "length")


def test_an_answer_that_ends_with_its_budget_ends_for_its_own_reason() -> None:
    assert run(Scripted(sure(4, 5, 6, 7)), 4, Strategy(4), Ask(4, max_nfe=1)).finish == "length"


def test_fixed_accepts_the_k_surest_of_the_first_block_that_is_not_whole() -> None:
    network = Scripted({4: 0.3, 5: 0.5, 6: 0.4, 7: 0.35} | sure(8, 9))
    out = run(network, 4, Strategy(4, N=2, open_at=0.0, fixed=3), Ask(8))
    assert written(out) == [[5, 6, 7], [4], [8, 9, 10], [11]]
    assert out.forwards[0].best_gap == pytest.approx(0.05, abs=1e-6)
    assert [f.tau_gap for f in out.forwards] == [math.inf] * 4


class Given:
    """An answer to compare."""

    def __init__(self, token_ids: list[int], finish_reason: str, nfe: int) -> None:
        self.token_ids, self.finish_reason, self.nfe = token_ids, finish_reason, nfe
        self.tokens = len(token_ids) + (finish_reason == "stop")


def answer(token_gap: float) -> Decoded:
    def forward(gap: float) -> Forward:
        return Forward(1, 1, 0, [], {}, [], 0.5, gap, 0.5)

    return Decoded([5, 6, 2], "stop", 2, [forward(token_gap), forward(0.5)], [0, 1, 1])


def test_equal_answers_compare_equal() -> None:
    assert compare(answer(1e-9), Given([5, 6], "stop", 2)) is False


@pytest.mark.parametrize(
    "got",
    [Given([5, 8], "stop", 2), Given([5], "stop", 2), Given([5, 6], "length", 2), Given([5, 6], "stop", 3)],
)
def test_a_difference_is_excused_only_after_a_near_decision(got: Given) -> None:
    assert compare(answer(1e-9), got) is True
    with pytest.raises(AssertionError, match="no decision up to there was near"):
        compare(answer(0.01), got)


def test_a_near_decision_after_the_first_difference_excuses_nothing() -> None:
    late = answer(0.01)
    late.forwards[1] = late.forwards[1]._replace(tau_gap=1e-9)
    with pytest.raises(AssertionError, match="token 0, forward 1"):
        compare(late, Given([9, 6], "stop", 2))


def test_the_reference_network_is_block_causal(tmp_path: Path) -> None:
    network = Qwen3(write(tmp_path, ZOO["b4"], seed=0), 4)
    ids = list(range(10, 22))
    rows = list(range(12))
    full = network(ids, rows)
    torch.testing.assert_close(full[:8], network(ids[:8], rows[:8]), rtol=0, atol=1e-4)
    moved = network([*ids[:7], 99, *ids[8:]], rows)
    assert (moved - full).abs().amax(1).gt(0.01).tolist() == [False] * 4 + [True] * 8
