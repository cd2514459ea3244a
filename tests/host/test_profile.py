"""A profile's table says what its trace holds, by verb and by kernel."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dlx import LLM, SamplingParams, cli, observe, worker
from dlx.caches import kernels
from dlx.config import Config
from dlx.errors import ConfigError, RequestError
from dlx.graphs.step import step_
from dlx.profile import Profile, Recording, profiled
from dlx.timeline import DEVICE, Table, op_of, tabled

PARTS = ("open", "look", "think", "decide", "commit")
HOST = ("plan", "launch", "step", "harvest", "take")
LONG = SamplingParams(max_tokens=150, threshold=1.0, ignore_eos=True)
Events = list[dict[str, Any]]


def recorded(llm: LLM, settings: Profile, params: SamplingParams = LONG) -> tuple[Table, Events]:
    """The table and the events of the trace."""
    with profiled(llm.engine, settings) as seen:
        llm.generate(list(range(40, 65)), params)
    assert seen.done and seen.table is not None
    return seen.table, json.loads((settings.out / "trace.json").read_text())["traceEvents"]


@pytest.fixture(scope="module")
def eager(nano_llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> tuple[Table, Events]:
    """Three steps of the nano model."""
    return recorded(nano_llm, Profile(start=2, steps=3, out=tmp_path_factory.mktemp("eager")))


def test_every_verb_of_host_and_step_is_in_the_trace_once_a_step(eager: tuple[Table, Events]) -> None:
    counts = Counter(event["name"] for event in eager[1] if event.get("cat") == "user_annotation")
    assert counts == {f"dlx:{verb}": 3 for verb in HOST + PARTS}
    assert [(line.name, line.n) for line in eager[0].host] == [(verb, 1.0) for verb in HOST]
    names = [line.name for line in eager[0].verbs]
    assert set(PARTS) <= set(names)
    assert names == sorted(names, key=DEVICE.index)


def test_the_tables_sums_are_the_traces(eager: tuple[Table, Events]) -> None:
    table, events = eager
    ops = [e for e in events if e.get("cat") == "cpu_op"]

    outer, reached = [], 0.0
    for e in sorted(ops, key=lambda e: (e["ts"], -e["dur"])):
        outer += [e] * (e["ts"] >= reached)  # else it is inside one that began before
        reached = max(reached, e["ts"] + e["dur"])
    total = sum(e["dur"] for e in outer)
    assert total > 0
    for rows in (table.verbs, table.kernels):
        assert sum(line.us for line in rows) * 3 == pytest.approx(total)
        assert sum(line.own_us for line in rows) * 3 == pytest.approx(total, rel=1e-3)  # one thread: nothing overlaps
        assert sum(line.n for line in rows) * 3 == pytest.approx(len(outer))
        assert sum(line.share for line in rows) == pytest.approx(1)
    for verb in HOST:
        us = sum(e["dur"] for e in events if e.get("name") == f"dlx:{verb}")
        (line,) = (line for line in table.host if line.name == verb)
        assert line.us * 3 == pytest.approx(us)


def test_every_op_of_a_layer_is_seen_as_often_as_it_runs(eager: tuple[Table, Events], nano_llm: LLM) -> None:
    of = {line.op: line.n for line in eager[0].kernels}
    layers = nano_llm.card.layers
    assert (of["attention"], of["kv_store"], of["project"]) == (layers, layers, 2 * layers)
    assert (of["candidates"], of["positions"]) == (1, 1)


def test_an_answer_is_the_same_while_it_is_recorded(nano_llm: LLM, tmp_path: Path) -> None:
    plain = nano_llm.generate(list(range(40, 65)), LONG)[0]
    with profiled(nano_llm.engine, Profile(start=1, steps=2, out=tmp_path)):
        assert nano_llm.generate(list(range(40, 65)), LONG)[0].token_ids == plain.token_ids
    assert nano_llm.engine.before_turn is None


def test_a_recording_that_the_run_cuts_short_holds_the_steps_there_were(nano_llm: LLM, tmp_path: Path) -> None:
    table, events = recorded(nano_llm, Profile(start=2, steps=50, out=tmp_path), SamplingParams(max_nfe=5))
    assert table.steps == 3
    assert sum(event.get("name") == "dlx:launch" for event in events) == 3
    record = json.loads((tmp_path / "table.json").read_text())
    assert (record["schema"], record["steps"], record["graphs"]) == (1, 3, "off")
    assert [line["name"] for line in record["host"]] == list(HOST)
    assert record["profile"] == {"start": 2, "steps": 50, "out": str(tmp_path), "tool": "torch"}


def test_a_run_too_short_to_record_is_told(nano_llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="ran 3 turns, and recording begins after 3"):
        recorded(nano_llm, Profile(start=3, out=tmp_path), SamplingParams(max_nfe=3))
    assert nano_llm.engine.before_turn is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("start", [1, 9])
def test_an_error_of_the_run_is_not_hidden_and_ends_the_recording(nano_llm: LLM, tmp_path: Path, start: int) -> None:
    def broken() -> None:
        with profiled(nano_llm.engine, Profile(start=start, steps=9, out=tmp_path)):
            nano_llm.generate([40, 41], SamplingParams(max_nfe=3))
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        broken()
    assert nano_llm.engine.before_turn is None
    assert not torch.autograd._profiler_enabled()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"start": 0}, "start=0"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 1.5}, "steps=1.5"),
        ({"steps": True}, "steps=True"),
        ({"tool": "nsys"}, "tool='nsys' is unknown; use torch or cuda"),
        ({"tool": "cuda"}, "tool='cuda' needs a CUDA device"),
    ],
)
def test_a_setting_that_is_not_allowed_is_named(
    nano_llm: LLM, values: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=told), profiled(nano_llm.engine, Profile(**values)):
        pytest.fail("it ran")


def test_a_folder_that_cannot_be_written_is_told(nano_llm: LLM, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        recorded(nano_llm, Profile(start=1, steps=1, out=tmp_path / "file"))
    assert nano_llm.engine.before_turn is None


def test_a_tool_of_cuda_is_told_where_the_steps_begin_and_end(nano_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int]] = []
    seen = Recording(nano_llm.engine, Profile(start=2, steps=3, tool="cuda"), "")
    for name in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, name, lambda name=name: told.append((name, seen.turns)))
    for _ in range(9):
        seen.before_turn()
    assert told == [("start", 3), ("stop", 6)]
    assert seen.done and seen.table is None


def event(cat: str, name: str, ts: float, dur: float, correlation: int | None = None, tid: int = 1) -> dict[str, Any]:
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 1, "tid": tid, "args": args}


def test_a_gpus_work_belongs_to_the_verb_and_the_operator_that_sent_it() -> None:
    table = tabled(
        [
            event("user_annotation", "dlx:launch", 0, 100),
            event("user_annotation", "dlx:step", 10, 80),
            event("user_annotation", "dlx:think", 20, 30),
            event("cpu_op", "dlx::attention", 21, 9),
            event("cuda_driver", "cuLaunchKernelEx", 22, 1, 1),
            event("cpu_op", "aten::mm", 31, 5),
            event("cuda_runtime", "cudaLaunchKernel", 32, 1, 2),
            event("user_annotation", "dlx:decide", 50, 20),
            event("cuda_driver", "cuLaunchKernelEx", 55, 1, 3),
            event("cuda_runtime", "cudaGraphLaunch", 80, 1, 4),
            event("cuda_runtime", "cudaMemcpyAsync", 95, 1, 5),
            event("cuda_runtime", "cudaLaunchKernel", 96, 1, 6, tid=2),
            event("kernel", "_attention", 200, 8, 1, tid=7),
            event("kernel", "nvjet_tst_64x8", 210, 4, 2, tid=7),
            event("kernel", "triton_poi_fused_where_3", 215, 2, 3, tid=7),
            event("kernel", "_attention", 220, 7, 4, tid=7),
            event("kernel", "_kv_store", 225, 5, 4, tid=7),  # begins before the one before has ended, and waits
            event("gpu_memcpy", "Memcpy DtoH", 240, 1, 5, tid=7),
            event("kernel", "vectorized_elementwise", 250, 5, 6, tid=7),
            event("gpu_user_annotation", "dlx:think", 200, 14, tid=7),
            {"ph": "M", "name": "process_name", "pid": 1},
        ],
        steps=1,
    )
    assert [(line.name, line.n, line.us) for line in table.host] == [("launch", 1, 100), ("step", 1, 80)]
    assert [(line.name, line.n, line.us, line.own_us) for line in table.verbs] == [
        ("launch", 1, 1, 1),
        ("step", 2, 12, 10),
        ("think", 2, 12, 12),
        ("decide", 1, 2, 2),
        ("outside", 1, 5, 5),
    ]
    assert [tuple(line) for line in table.kernels] == [
        ("_attention", "attention", 2, 15, 15, 0.5),
        ("vectorized_elementwise", "other", 1, 5, 5, 5 / 30),
        ("nvjet_tst_64x8", "matmul", 1, 4, 4, 4 / 30),
        ("_kv_store", "kv_store", 1, 5, 3, 0.1),
        ("triton_poi_fused_where_3", "fused", 1, 2, 2, 2 / 30),
        ("Memcpy DtoH", "copy", 1, 1, 1, 1 / 30),
    ]
    lines = str(table).splitlines()
    assert lines[0].split() == ["host,", "a", "step", "of", "1", "n", "µs"]
    assert ["_attention", "attention", "2", "15.0", "15.0", "50.0"] in [line.split() for line in lines]


def test_a_long_table_is_cut_and_its_rest_summed() -> None:
    events = [event("cpu_op", f"aten::op{n}", 10 * n, 1 + n / 100) for n in range(100)]
    table = tabled(events, steps=2)
    assert len(table.kernels) == 100
    rows = str(table).split("\n\n")[2].splitlines()
    assert len(rows) == 1 + 32
    assert rows[-1].split()[:3] == ["69", "more", "34.5"]


def test_the_name_of_a_kernel_says_one_op() -> None:
    homes: dict[str, set[str]] = {}
    for kernel in kernels():
        homes.setdefault(kernel.__name__, set()).add(kernel.__module__.split(".")[2])
    assert not {name: ops for name, ops in homes.items() if len(ops) > 1}
    assert homes["_attention"] == {"attention"}


@pytest.mark.parametrize(
    ("kernel", "sender", "op"),
    [
        ("_walk", "", "candidates"),
        ("dlx::project", "", "project"),
        ("void at::native::copy", "dlx::kv_store", "kv_store"),
        ("triton_per_fused_sum_3", "", "fused"),
        ("sm90_xmma_gemm_bf16", "aten::mm", "matmul"),
        ("void at::native::index", "aten::index", "aten::index"),
        ("Memset (Device)", "aten::zero_", "copy"),
        ("something", "", "other"),
    ],
)
def test_a_kernel_is_for_an_op(kernel: str, sender: str, op: str) -> None:
    assert op_of(kernel, sender, {"_walk": "candidates"}) == op


def test_the_ranges_of_a_step_follow_each_other_and_end_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    @contextmanager
    def span(name: str) -> Any:
        told.append(name)
        try:
            yield
        finally:
            told.append(f"/{name}")

    def step(at: Callable[[str], None], fail: bool = False) -> None:
        at("open")
        at("look")
        if fail:
            raise ZeroDivisionError

    monkeypatch.setattr(observe, "span", span)
    observe.marked(step)()
    assert told == ["open", "/open", "look", "/look"]
    with pytest.raises(ZeroDivisionError):
        observe.marked(partial(step, fail=True))()
    assert told == ["open", "/open", "look", "/look"] * 2


def test_a_step_that_is_compiled_has_no_ranges(nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "marked", lambda step: pytest.fail("a compiled step is marked"))
    made: list[Any] = []
    config = Config.from_args(nano, graphs="compile", device="cpu", max_num_seqs=1)
    w = worker.Worker(config)
    monkeypatch.setattr(w.graphs, "add", lambda key, fn: made.append(fn))
    w._step_graph(1)
    (turn,) = made
    assert turn.committing.func is turn.plain.func is step_
    assert (turn.committing.keywords, turn.plain.keywords) == ({}, {"commits": False})


def test_the_command_prints_the_table(nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["profile", "12 + 30 = ?", "--model", str(nano), "--device", "cpu", "--start", "2", "--steps", "2"]
    assert cli.main([*line, "--out", str(tmp_path), "--forwards", "2", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((tmp_path / "table.json").read_text())
    assert record["forwards"] == 2
    assert cli.main([*line, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in HOST + PARTS)
    assert cli.main([*line, "--out", str(tmp_path), "--max-nfe", "1"]) == 2
    assert "lower start" in capsys.readouterr().err
