"""The debug ladder: eager, compiled and (on a GPU) captured runs give the same text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dlx import LLM, ConfigError, SamplingParams
from dlx.graphs.capture import Graphs

PROMPTS = [[{"role": "user", "content": q}] for q in ("12 + 34 =", "57 + 61 =", "12 + 34 + 56 =", "88 + 11 + 45 =")]


def test_every_rung_that_this_machine_has_gives_the_same_text(nano: Path) -> None:
    rungs = ["off", "compile"] + (["capture"] if torch.cuda.is_available() else [])
    params = [SamplingParams(max_tokens=32), SamplingParams(max_tokens=32, temperature=0.9, seed=3)] * 2
    answers = {}
    for rung in rungs:
        with LLM(nano, policy="multi_bd", graphs=rung, dtype="float32", max_num_seqs=1) as llm:
            answers[rung] = [(o.token_ids, o.nfe, o.finish_reason) for o in llm.generate(PROMPTS, params)]
    assert len(answers["off"][0][0]) > 0
    assert all(answers[rung] == answers["off"] for rung in rungs)


def answers_as_rows_arrive(nano: Path, policy: str) -> list[tuple[list[int], int]]:
    """(ids, forwards) of four requests that arrive two turns apart, so that larger steps are made while rows decode."""
    said: dict[int, tuple[list[int], int]] = {}
    with LLM(nano, policy=policy, graphs="off", device="cpu", max_num_seqs=4) as llm:
        llm.engine.lag = 1
        for turn in range(1000):
            if turn % 2 == 0 and turn < 8:
                p = SamplingParams(
                    max_tokens=160 + turn, threshold=0.0, temperature=turn % 4 / 3, seed=7, ignore_eos=True
                )
                llm.engine.add_all([([40 + turn] * (9 + 5 * turn), p)])
            said |= {c.id: (c.output.token_ids, c.output.nfe) for c in llm.engine.step() if c.output}
            if llm.engine.idle:
                break
    return [said[id] for id in range(4)]


@pytest.mark.parametrize("policy", ["single_bd", "multi_bd"])
def test_making_a_graph_in_mid_flight_touches_no_row(nano: Path, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = answers_as_rows_arrive(nano, policy)
    made: list[tuple[str, int]] = []
    add = Graphs.add

    def warmed(self: Graphs, key: tuple[str, int], fn: Callable[[], None]) -> None:
        """As a capture does: the function runs before it is there to be replayed."""
        made.append(key)
        fn()
        fn()
        add(self, key, fn)

    monkeypatch.setattr(Graphs, "add", warmed)
    assert answers_as_rows_arrive(nano, policy) == plain
    assert [key for key in made if key[0] == "step"] == [("step", 1), ("step", 2), ("step", 4)]


def test_a_function_is_replayed_by_its_key() -> None:
    seen: list[str] = []
    graphs = Graphs("off", torch.device("cpu"))
    graphs.add(("step", 1), lambda: seen.append("one"))
    graphs.add(("step", 2), lambda: seen.append("two"))
    graphs.replay(("step", 2))
    assert seen == ["two"]
    assert ("step", 1) in graphs
    assert ("step", 4) not in graphs


def test_capture_on_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a CUDA device, not cpu"):
        Graphs("capture", torch.device("cpu"))
