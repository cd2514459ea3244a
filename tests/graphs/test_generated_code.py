"""What Inductor makes of the step, read without compiling it: nothing between a layer's ops, no copy of K/V."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch._inductor.graph import GraphLowering

from dlx.config import Config
from dlx.worker import Worker

LAYER = ["project", "kv_store", "attention", "accumulate", "project", "accumulate"]


class Read(Exception):
    """Raised in place of compiling what was generated."""


def generated(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> str:
    """The body of the function that would run the step of one row."""
    codes: list[str] = []
    original = GraphLowering.codegen

    def codegen(self: GraphLowering) -> object:
        codes.append(original(self)[0].value)
        raise Read

    monkeypatch.setattr(GraphLowering, "codegen", codegen)
    key = worker._step_graph(1)
    with torch.no_grad(), torch._inductor.config.patch(fx_graph_cache=False), pytest.raises(Exception, match="Read"):
        worker.graphs.replay(key)
    torch._dynamo.reset()
    return codes[0][codes[0].index("def call(") :]


@pytest.mark.parametrize(("policy", "kind"), [("single_bd", None), ("multi_bd", None), ("multi_bd", "fp8")])
def test_a_layer_is_six_kernels_and_the_cache_is_never_copied(
    nano: Path, policy: str, kind: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.from_args(
        nano, policy, "compile", device="cpu", max_num_seqs=1, max_model_len=2048, kv_cache_dtype=kind
    )
    worker = Worker(config)
    code = generated(worker, monkeypatch)
    calls = re.findall(r"torch\.ops\.dlx\.(\w+)\.default\(|(cpp_fused)\w+\(", code)
    names = [op or fused for op, fused in calls]
    first, last = names.index("project"), names.index("candidates")
    layers = worker.card.layers
    assert names[first : first + 6 * layers] == LAYER * layers
    assert set(names[first + 6 * layers : last]) == {"cpp_fused"}
    made = [
        math.prod(int(n) for n in shape.split(",") if n.strip())
        for shape in re.findall(r"empty_strided_cpu\(\(([\d, ]*)\)", code)
    ]
    assert max(made) < worker.kv[0].numel()
    assert len(names) - 6 * layers <= 12  # open, look, decide and commit, positions and candidates among them
