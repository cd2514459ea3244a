"""What Inductor makes of a forward, read without compiling it: layers as one op, no copy of K/V."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.graph import GraphLowering
from torch.utils._python_dispatch import TorchDispatchMode

from dlx.config import Config
from dlx.graphs import loop
from dlx.worker import Worker

LAYER = ["project", "kv_store", "attention", "accumulate", "project", "accumulate"]
LAST = [
    "extern_kernels",
    "kv_store",
    "attention",
    "extern_kernels",
    "extern_kernels",
    "extern_kernels",
]  # by cuBLAS, not by our matmuls


class Read(Exception):
    """Raised in place of compiling what was generated."""


class Ops(TorchDispatchMode):
    """Writes down the dlx ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "dlx":
            self.names.append(func._schema.name.split("::")[1])
        return func(*args, **kwargs or {})


def generated(make: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> str:
    """The body of the first function that would run a graph."""
    codes: list[str] = []
    original = GraphLowering.codegen

    def codegen(self: GraphLowering) -> object:
        codes.append(original(self)[0].value)
        raise Read

    with monkeypatch.context() as patch, torch.no_grad(), torch._inductor.config.patch(fx_graph_cache=False):
        patch.setattr(GraphLowering, "codegen", codegen)
        with pytest.raises(Exception, match="Read"):
            make()
    torch._dynamo.reset()
    return codes[0][codes[0].index("def call(") :]


def called(code: str) -> list[str]:
    """The ops and fused kernels that it runs, in their order."""
    calls = re.findall(r"torch\.ops\.dlx\.(\w+)\.default\(|(cpp_fused)\w+\(|(extern_kernels)\.\w*mm\(", code)
    return [next(filter(None, names)) for names in calls]


def largest(code: str) -> int:
    """Elements of the largest tensor that it allocates."""
    shapes = re.findall(r"empty_strided_cpu\(\(([\d, ]*)\)", code)
    return max(math.prod(int(n) for n in shape.split(",") if n.strip()) for shape in shapes)


@pytest.mark.parametrize(("policy", "kind"), [("single_bd", None), ("multi_bd", None), ("multi_bd", "fp8")])
def test_the_layers_are_one_op_and_the_cache_is_never_copied(
    nano: Path, policy: str, kind: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.from_args(
        nano, policy, "compile", device="cpu", max_num_seqs=1, max_model_len=2048, kv_cache_dtype=kind
    )
    worker = Worker(config)
    turn, _ = worker._step(loop.rows(worker.sent, 1), 0, 0)
    for step, places in ((turn.committing, worker.policy.N + 1), (turn.plain, worker.policy.N)):
        code = generated(worker.graphs.compiled(step), monkeypatch)
        names = called(code)
        few = worker.L * places <= 64
        layers = ["narrow_layers"] if few else ["wide_layers", *LAST]
        assert [name for name in names if name != "cpp_fused"] == ["positions", *layers, "candidates"]
        assert len(names) <= (12 if few else 20)  # open, look, decide and commit among them
        assert largest(code) < worker.kv[0].numel()


def test_a_layer_is_six_kernels(nano: Path) -> None:
    worker = Worker(Config.from_args(nano, "single_bd", "off", device="cpu", max_num_seqs=1, max_model_len=256))
    turn, _ = worker._step(loop.rows(worker.sent, 1), 0, 0)
    for step in (turn.committing, turn.plain):
        with torch.no_grad(), Ops() as ran:
            step()
        assert ran.names == ["positions", *LAYER * worker.card.layers, "candidates"]


def test_the_last_layer_of_a_prompt_only_stores(nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(Config.from_args(nano, "single_bd", "compile", device="cpu", max_num_seqs=1, max_model_len=2048))
    code = generated(lambda: worker.graphs.replay(worker._prefill_graph(512)), monkeypatch)
    names = [name for name in called(code) if name != "cpp_fused"]
    assert names == ["positions", "wide_layers", "extern_kernels", "kv_store"]
    assert largest(code) < worker.kv[0].numel()
