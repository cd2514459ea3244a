"""The debug ladder: eager, compiled and (on a GPU) captured runs give the same text."""

from __future__ import annotations

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
