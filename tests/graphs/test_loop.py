"""A launch of several forwards commits what as many launches of one would have."""

from __future__ import annotations

import random

import pytest
import torch

from dlx import LLM, SamplingParams
from dlx.graphs import loop
from dlx.graphs.buffer import FACTS, LENGTH, RUNNING, STOP


def outbox(tok: list[list[int]], n: list[int], nfe: list[int], why: list[int], start: int = 0) -> torch.Tensor:
    rows = [[*t, a, b, c, start] for t, a, b, c in zip(tok, n, nfe, why, strict=True)]
    return torch.tensor(rows, dtype=torch.int32)


def test_a_forward_is_gathered_behind_those_before() -> None:
    rng = random.Random(0)
    B, width, most = 3, 4, 5
    out = torch.full((B, most * width + FACTS), -7, dtype=torch.int32)
    out[:, -FACTS:] = 0
    want: list[list[int]] = [[] for _ in range(B)]
    for turn in range(most):
        tok = [[rng.randrange(100) for _ in range(width)] for _ in range(B)]
        n = [rng.randint(0, width) for _ in range(B)]
        loop.gather_(out, outbox(tok, n, [turn + 1] * B, [RUNNING] * B, 8 + turn))
        for b in range(B):
            want[b] += tok[b][: n[b]]
    for b in range(B):
        assert out[b, -FACTS:].tolist() == [len(want[b]), most, RUNNING, 8 + most - 1]
        assert out[b, : len(want[b])].tolist() == want[b]


def test_why_a_row_ended_outlives_the_forwards_in_which_it_is_inert() -> None:
    out = torch.zeros(2, 8 + FACTS, dtype=torch.int32)
    loop.gather_(out, outbox([[1, 2], [3, 4]], [2, 1], [1, 1], [STOP, RUNNING]))
    loop.gather_(out, outbox([[9, 9], [5, 6]], [0, 2], [1, 2], [RUNNING, LENGTH]))
    assert out[:, -2].tolist() == [STOP, LENGTH]
    assert out[:, -FACTS].tolist() == [2, 3]
    assert out[1, :3].tolist() == [3, 5, 6]


@pytest.mark.parametrize("policy", ["single_bd", "multi_bd"])
def test_the_length_of_a_launch_changes_no_answer(policy: str) -> None:
    prompts = [[{"role": "user", "content": f"Compute ({a} + 7) * 3 - {a + 2}."}] for a in range(11, 16)]
    params = [SamplingParams(max_tokens=60, temperature=t, seed=3) for t in (0.0, 0.0, 0.0, 0.7, 0.7)]
    params[1] = SamplingParams(max_tokens=60, max_nfe=5)
    answers = {}
    for forwards in (1, 3, 200):
        with LLM(policy=policy, forwards=forwards, max_num_seqs=2, graphs="off", device="cpu") as llm:
            answers[forwards] = [(o.token_ids, o.nfe, o.finish_reason) for o in llm.generate(prompts, params)]
            launches = llm.engine.worker.epoch
        assert answers[forwards] == answers[1]
    assert launches < 6  # 200 forwards a launch: a launch for each time that rows were admitted


def test_a_launch_ends_where_the_host_halts_it() -> None:
    launch = loop.allocate(1, 4, 8, torch.device("cpu"))
    turns = []

    def begin() -> None:
        launch.on.fill_(1)

    def turn() -> None:
        turns.append(1)
        if len(turns) == 3:
            launch.halt.fill_(int(launch.epoch))  # as the host does for the launch that runs

    run = loop.unrolled(begin, turn, launch)
    for epoch, ran in ((1, 3), (2, 8 + 3)):
        launch.epoch.fill_(epoch)
        launch.left.fill_(launch.most)
        run()
        assert len(turns) == ran


@pytest.mark.parametrize("forwards", [0, 4097, 1.5])
def test_a_launch_of_no_forwards_is_refused(forwards: float) -> None:
    from dlx.errors import ConfigError

    with pytest.raises(ConfigError, match="forwards="):
        LLM(forwards=forwards, device="cpu")
