"""Traces of another engine: which blocks a forward sees, and what dlx does otherwise on purpose.

The other engine is told again in plain Python here and must give its recorded traces; with the one deliberate change,
a place more for the block that is stored, the same telling must give dlx's own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dlx.graphs.policies import POLICIES
from dlx.graphs.rules import Candidates, Seen
from dlx.graphs.step import Ids, step_
from tests.graphs.test_step import MASK, L, V, begin, sure

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "golden" / "diffulex.json").read_text())
TRACES: dict[str, dict[str, Any]] = GOLDEN["traces"]
ADD, SEMI = GOLDEN["add_block"], GOLDEN["semi_complete"]

Blocks = list[list[Any]]  # [block, status, masks left]


@dataclass(frozen=True)
class Pace:
    """The traces' sampler: so many tokens of a block whose predecessor is far enough, so many of another."""

    forced: int
    unforced: int

    def __call__(self, c: Candidates, w: Seen) -> Tensor:
        most = torch.where(w.before >= w.force_at[:, None], self.forced, self.unforced)
        return w.todo & (w.todo.cumsum(-1) <= most[..., None])


def told(trace: dict[str, Any], forwards: int, spare: bool) -> list[tuple[int, Blocks, int]]:
    """(start of the window, blocks before the forward, new tokens) of decode forwards, by the other engine's rules.

    spare  a block that is stored takes no place from those that decode, and prefill decodes nothing
    """
    W, prompt = trace["W"], trace["prompt"]
    given = prompt % L
    window: Blocks = [[prompt // L, "A", L - given]] if given else []
    base, seen = prompt // L, []
    if not given and not spare:
        seen.append((0, [[base + i, "D", L] for i in range(W)], 0))  # a prompt of whole blocks is prefilled alone
    while len(seen) < forwards:
        room = W + int(spare and bool(window) and window[0][1] == "T")
        if (not window or (L - window[-1][2]) / L >= ADD) and len(window) < room:
            window.append([base + len(window), "A", L])
        shown = [list(block) for block in window]
        news, before = 0, 1.0
        for block, (_, status, left) in zip(window, shown):
            many = min(left, trace["forced" if before >= SEMI else "unforced"]) if status == "A" else 0
            block[2] -= many
            news += many
            before = (L - left) / L
        dummies = [[base + i, "D", L] for i in range(len(shown), W)] if not spare else []
        seen.append((base * L, shown + dummies, news))
        while window and window[0][1] == "T":
            window.pop(0)
            base += 1
        for block in window:
            if block[2]:
                break
            block[1] = "T"
    return seen


def decoded(trace: dict[str, Any], forwards: int) -> list[tuple[int, Blocks, int]]:
    """The same of dlx's step: blocks and new tokens are read off the buffer, before and after."""
    policy = replace(POLICIES["multi_bd"], N=trace["W"], select=Pace(trace["forced"], trace["unforced"]))
    buf, kv, out = begin(policy, [{"prompt": trace["prompt"], "max_tokens": 40, "open_at": ADD, "force_at": SEMI}])
    net = sure(64)
    seen = []
    for _ in range(forwards):
        start, before = int(buf.start[0]), (buf.tok[0] == MASK).sum(-1).tolist()
        whole = [*buf.whole[0].tolist(), False].index(False)
        step_(policy, Ids(MASK, V), net, buf, kv, out)
        slid = (int(buf.start[0]) - start) // L
        opened = int(buf.open[0]) + slid
        after = [0] * slid + (buf.tok[0] == MASK).sum(-1).tolist()
        blocks: Blocks = [[start // L + i, "T" if i < whole else "A", before[i]] for i in range(opened)]
        seen.append((start, blocks, sum(block[2] - after[i] for i, block in enumerate(blocks))))
    return seen


@pytest.mark.parametrize("name", TRACES)
def test_the_telling_gives_the_recorded_traces(name: str) -> None:
    trace = TRACES[name]
    rows = [(0 if phase == "P" else ctx, blocks, new) for phase, ctx, _, blocks, new in trace["forwards"]]
    seen = [
        (0 if i == 0 else start, blocks, new) for i, (start, blocks, new) in enumerate(told(trace, len(rows), False))
    ]
    assert seen == rows


@pytest.mark.parametrize("name", TRACES)
def test_with_a_spare_place_it_gives_those_of_dlx(name: str) -> None:
    assert decoded(TRACES[name], 8) == told(TRACES[name], 8, spare=True)


def active(blocks: Blocks) -> Blocks:
    return [block for block in blocks if block[1] == "A"]


def test_one_block_at_a_time_is_the_recorded_trace_without_its_store_forwards() -> None:
    theirs = [(blocks, new) for _, _, _, blocks, new in TRACES["T1"]["forwards"] if new]
    ours = [(active(blocks), new) for _, blocks, new in decoded(TRACES["T1"], len(theirs))]
    assert ours == theirs
    assert len(TRACES["T1"]["forwards"]) == len(theirs) + 3  # the prefill, and a store a block


def test_several_blocks_are_the_recorded_trace_until_the_first_is_stored() -> None:
    theirs = [(ctx, active(blocks), new) for _, ctx, _, blocks, new in TRACES["T3"]["forwards"][1:5]]
    assert decoded(TRACES["T3"], 4) == theirs
    (_, blocks, new), stored = decoded(TRACES["T3"], 5)[4], TRACES["T3"]["forwards"][5]
    assert [b for b in blocks if b in stored[3]] == stored[3] and len(active(blocks)) == TRACES["T3"]["W"]
    assert new == stored[4] + 1


def test_a_prompts_tail_decodes_with_the_next_block_at_once() -> None:
    _, _, _, blocks, new = TRACES["T2"]["forwards"][0]
    assert decoded(TRACES["T2"], 1) == [(4, blocks, new)]
