"""The forward of fewer places: the same where no block only commits, and run there and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from dlx.bench import How, Scene, stand
from dlx.bench.calls import calls
from dlx.config import Config
from dlx.graphs import capture, loop
from dlx.graphs.capture import Graphs
from dlx.graphs.either import Either, commits
from dlx.graphs.policies import POLICIES
from dlx.graphs.step import Ids, denoise
from dlx.worker import Worker
from tests.checkpoints import Shape, write
from tests.graphs import test_step
from tests.graphs.test_step import MASK, Table, V, begin

L = 8  # as some rules want it
WINDOWED = [name for name, p in POLICIES.items() if p.turn is None and p.canvas is None]


@pytest.mark.parametrize("more", ["", "shift", "watch"])
@pytest.mark.parametrize("name", WINDOWED)
def test_where_no_block_only_commits_fewer_places_give_the_same(
    name: str, more: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_step, "L", L)
    rng, policy, shift = Random(name), replace(POLICIES[name], L=L, watch=more == "watch"), more == "shift"
    net = Table([rng.randrange(1, V - 2) for _ in range(64)], [rng.uniform(2, 9) for _ in range(64)])
    asked = [{"prompt": p, "max_tokens": 30 + p, "accept": 0.7, "max_nfe": 60} for p in (3, 8, 5)]
    asked[1]["fixed"] = [(at, 7) for at in (9, *range(16, 24), 30)]  # one block of nothing else
    buf, kv, _ = begin(policy, asked)
    if shift:
        buf = buf._replace(last=torch.zeros(3, V))
    committing = plain = 0
    while not buf.done.all():
        pages = tuple(t.clone() for t in kv)
        new, out = denoise(policy, Ids(MASK, V, shift), net, buf, kv)
        assert net.views[-1].pos.shape[1] == (policy.N + 1) * L
        if commits(buf.whole, buf.done):
            committing += 1
        else:
            plain += 1
            few, few_out = denoise(policy, Ids(MASK, V, shift), net, buf, pages, commits=False)
            assert net.views[-1].pos.shape[1] == policy.N * L
            pairs = [*zip(new[:-1], few[:-1], strict=True), *((t, few.mem[k]) for k, t in new.mem.items())]
            for a, b in (*pairs, *zip(out, few_out, strict=True), *zip(kv, pages, strict=True)):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        buf = new
    assert committing >= 2 and plain >= 2


def test_a_block_that_only_commits_is_one_of_a_running_row_and_leads() -> None:
    whole, done = torch.zeros(2, 2, dtype=torch.bool), torch.tensor([False, True])
    assert not commits(whole, done)
    whole[0, 1] = whole[1, 0] = True  # it waits for the one before; its row has ended
    assert not commits(whole, done)
    whole[0, 0] = True
    assert commits(whole, done)


@pytest.mark.parametrize(("block", "invariant", "two"), [(8, False, False), (16, False, True), (16, True, False)])
def test_long_blocks_have_two_forwards_unless_rows_are_to_be_strangers(
    block: int, invariant: bool, two: bool, tmp_path: Path
) -> None:
    shape = Shape(block, heads=2, kv_heads=1, head_dim=16, layers=1, hidden=32, ffn=48)
    how = {"device": "cpu", "max_num_seqs": 1, "batch_invariant": invariant}
    worker = Worker(Config.from_args(write(tmp_path / "model", shape, 1), "single_bd", "off", **how))
    assert isinstance(worker._step(worker.sent, 0, 0)[0], Either) == two


def turn(seen: list[str]) -> Either:
    """Of two rows, neither of which commits."""
    told = (lambda: seen.append("committing"), lambda: seen.append("plain"))
    return Either(*told, torch.zeros(2, 2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool))


def test_on_a_cpu_the_host_runs_what_the_rows_ask_for() -> None:
    seen: list[str] = []
    graphs, either = Graphs("off", torch.device("cpu")), turn(seen)
    graphs.add("step", either)
    graphs.replay("step")
    either.whole[1, 0] = True
    graphs.replay("step")
    graphs.commits = False  # as a measurement wants it
    graphs.replay("step")
    assert seen == ["plain", "committing", "plain"]


def test_compiled_both_are_ready_before_they_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(capture, "compiled", lambda fn: fn)
    graphs = Graphs("compile", torch.device("cpu"))
    graphs.add("step", turn(seen))
    assert seen == ["committing"]  # the rare one; the other is run by whoever prepares
    graphs.replay("step")
    assert seen == ["committing", "plain"]


class Fake:
    """A captured graph."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.replay, self.ready = run, False

    def instantiate(self) -> None:
        self.ready = True


class OnGpu(Graphs):
    """Graphs of a GPU whose captures are the functions themselves. A subclass, as captures need a GPU."""

    def __init__(self) -> None:
        super().__init__("off", torch.device("cpu"))
        self.mode = "capture"
        self.compiled = lambda fn: fn

    def _graph(self, fn: Callable[[], None]) -> Any:
        return Fake(fn)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """What a driver that has WHILE nodes, and no IF nodes, was asked to join: (an Either, a loop)."""
    asked: list[tuple[bool, bool]] = []

    class Joined:
        def __init__(self, turn: Any, *loop: Any) -> None:
            asked.append((isinstance(turn, Either), bool(loop)))
            if isinstance(turn, Either):
                raise RuntimeError("cudaGraphAddNode failed: cudaErrorInvalidValue")
            self.replay = turn.replay

    monkeypatch.setattr(capture, "Nodes", Joined)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    return asked


def test_a_driver_without_if_nodes_computes_all_places(
    driver: list[tuple[bool, bool]], caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str] = []
    graphs = OnGpu()
    for key in ("larger", "smaller"):
        graphs.add(key, turn(seen))
        graphs.replay(key)
    assert seen == ["committing", "committing"]
    assert driver == [(True, False)]  # it is asked once
    (warning,) = [r.message for r in caplog.records]
    assert "every forward computes all places" in warning and "cudaGraphAddNode failed" in warning


def test_a_driver_without_if_nodes_keeps_its_loop(driver: list[tuple[bool, bool]]) -> None:
    seen: list[str] = []
    graphs, launch = OnGpu(), loop.allocate(1, 4, 3, torch.device("cpu"))
    graphs.add_loop("key", lambda: None, turn(seen), launch, unroll=False)
    graphs.replay("key")
    assert (graphs.routes["key"], seen) == ("while", ["committing"])
    assert driver == [(True, True), (False, True)]


def test_a_measurement_stands_where_no_block_commits_or_where_each_does(nano: Path) -> None:
    scene = Scene(nano, 16, 64, 2, 4)
    at = stand(scene.worker(How(graphs="off", device="cpu"), 256), scene)
    buf = at.worker.buf
    at.committing()
    assert commits(buf.whole, buf.done)
    at.plain()
    assert not commits(buf.whole, buf.done)
    flops = {kind: sum(call.cost.flops for call in calls(at, kind) if call.op == "project") for kind in (False, True)}
    assert flops[True] == 2 * flops[False] > 0
    at.plain()
    assert sum(call.cost.flops for call in calls(at) if call.op == "project") == flops[False]
