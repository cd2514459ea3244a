"""The debug ladder: eager, compiled and (on a GPU) captured runs give the same text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dlx import LLM, ConfigError, SamplingParams
from dlx.config import Config
from dlx.graphs import capture, loop
from dlx.graphs.capture import Graphs
from dlx.graphs.either import Either, both
from dlx.worker import Worker

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

    def warmed(self: Graphs, key: tuple[str, int], fn: Callable[[], None] | Either) -> None:
        """As a capture does: the function runs before it is there to be replayed, or both."""
        made.append(key)
        for _ in range(2):
            both(lambda run: run(), fn)
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


class Short(Graphs):
    """Graphs of a GPU that has no memory for a capture. A subclass, as captures need a GPU."""

    def __init__(self, ended: bool) -> None:
        super().__init__("compile", torch.device("cpu"))
        self.mode = "capture"
        self.ended = ended  # else the capture cannot be ended either, and that is what is raised

    def _graph(self, fn: Callable[[], None]) -> torch.cuda.CUDAGraph:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        finally:
            if not self.ended:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is called of torch.cuda beside a capture, and functions as they are in place of compiled ones."""
    for name in ("current_stream", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: None)
    monkeypatch.setattr(capture, "compiled", lambda fn: fn)


@pytest.mark.parametrize("ended", [True, False])
def test_a_bucket_without_memory_for_its_graph_runs_compiled_with_one_warning(
    cuda: None, ended: bool, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str] = []
    graphs = Short(ended)
    graphs.add(("step", 8), lambda: seen.append("eight"))
    graphs.replay(("step", 8))
    graphs.replay(("step", 8))
    assert seen == ["eight", "eight"]
    assert graphs.dropped == {("step", 8)}
    (warning,) = [r.message for r in caplog.records]
    assert "no memory to capture ('step', 8)" in warning and "lower gpu_memory_utilization" in warning


def test_a_loop_without_memory_for_its_graph_runs_turn_by_turn(cuda: None) -> None:
    seen: list[str] = []
    launch = loop.allocate(1, 4, 3, torch.device("cpu"))
    launch.left.fill_(2)
    launch.epoch.fill_(1)
    launch.on.fill_(1)
    graphs = Short(ended=True)
    graphs.add_loop("key", lambda: seen.append("begin"), lambda: seen.append("turn"), launch, unroll=False)
    graphs.replay("key")
    graphs.turn("key")
    assert seen == ["begin", "turn", "turn", "turn"]
    assert (graphs.routes["key"], graphs.dropped) == ("unrolled", {"key"})


def test_another_error_of_a_capture_is_raised(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = Short(ended=True)

    def broken(fn: Callable[[], None]) -> torch.cuda.CUDAGraph:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(graphs, "_graph", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        graphs.add(("step", 1), lambda: None)
    assert not graphs.dropped and ("step", 1) not in graphs


def test_rows_take_a_larger_graph_before_one_that_was_dropped(nano: Path) -> None:
    w = Worker(Config.from_args(nano, "single_bd", "compile", device="cpu", max_num_seqs=4, max_model_len=128))
    for B in (1, 2, 4):
        w.graphs._run["step", B] = lambda: None
    assert [w._ready(n, 0, 0)[0] for n in (1, 2, 4)] == [1, 2, 4]
    w.graphs.dropped |= {("step", 1), ("step", 4)}
    assert [w._ready(n, 0, 0)[0] for n in (1, 2, 4)] == [2, 2, 4]


def test_capture_on_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a CUDA device, not cpu"):
        Graphs("capture", torch.device("cpu"))


@pytest.mark.parametrize(("numbered", "names"), [(False, "original_aten"), (True, False)])
def test_kernels_are_named_for_what_they_fuse_or_numbered(numbered: bool, names: object) -> None:
    seen: list[object] = []

    def backend(gm: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        from torch._inductor import config

        seen.append(config.triton.descriptive_names)
        return gm.forward

    capture.compiled(lambda: torch.zeros(1), numbered, backend=backend)()
    assert seen == [names]
