"""The roofline counts what a step's ops must move, and gives each call of an op its own kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dlx.bench import How, Scene, roofline, stand
from dlx.bench.calls import Call, calls, matmul_cost
from dlx.bench.report import lines
from dlx.bench.roof import matched, others, table
from dlx.bench.trace import Owned, Trace
from dlx.ops.op import Cost

CPU = How(graphs="off", device="cpu")


def test_a_step_calls_each_op_as_often_as_it_has_layers(nano: Path) -> None:
    scene = Scene(nano, block=16, context=64, requests=2, accept=4)
    found = calls(stand(scene.worker(CPU, 256), scene))
    assert [(c.op, c.of) for c in found[:5]] == [
        ("positions", ""), ("project", "attn.qkv"), ("kv_store", "attn.q_norm"), ("attention", ""),
        ("accumulate", "attn.out"),
    ]  # fmt: skip
    assert sum(c.op == "project" for c in found) == 2 * 3
    assert [c.op for c in found[-1:]] == ["candidates"]


def test_the_bytes_of_a_step_are_those_counted_by_hand(nano: Path) -> None:
    scene = Scene(nano, block=16, context=64, requests=2, accept=4)
    rows = {(r["op"], r["of"]): r for r in roofline(scene, CPU, "python bench")["rows"]}
    E, F, H, G, D, V, layers = 96, 256, 3, 1, 32, 320, 3  # tests/data/nano/config.json
    T = 2 * 1 * 16  # rows · places that decode · L
    qkv = (H + 2 * G) * D
    assert rows["project", "attn.qkv"]["bytes"] == layers * 4 * (qkv * E + T * E + T * qkv)
    assert rows["project", "mlp.gate_up"]["bytes"] == layers * 4 * (2 * F * E + T * E + T * F)
    assert rows["accumulate", "mlp.down"]["bytes"] == layers * 4 * (E * F + T * F + 3 * T * E)
    assert rows["accumulate", "attn.out"]["flops"] == layers * 2 * T * H * D * E
    assert rows["candidates", "table"]["flops"] == 2 * T * V * E
    keys = 2 * (64 + 16)  # the block that decodes and all before it
    assert rows["attention", ""]["bytes"] == layers * 4 * (2 * T * H * D + 2 * keys * G * D)


def test_wide_steps_count_the_matmuls_that_are_torchs(nano: Path) -> None:
    scene = Scene(nano, block=16, context=32, requests=24, accept=4)  # 30 blocks: 480 rows of a matmul
    rows = {(r["op"], r["of"]): r for r in roofline(scene, CPU, "python bench")["rows"]}
    assert rows["mm", "mlp.down"]["calls"] == 3
    assert rows["mm", "mlp.down"]["bytes"] == 3 * 4 * (480 * 256 + 256 * 96 + 480 * 96)
    assert ("project", "attn.qkv") not in rows


def test_a_matmul_moves_every_element_once() -> None:
    cost = matmul_cost(torch.zeros(3, 5), torch.zeros(7, 5).t())
    assert cost == Cost(2 * 3 * 5 * 7, 4 * (3 * 5 + 5 * 7 + 3 * 7))


def test_each_call_owns_the_next_kernels_of_its_names() -> None:
    run = ["fuse", "mul", "attend", "sum", "mul", "mul", "attend", "sum", "mul", "end"]
    wanted = [["mul"], ["attend", "sum"], ["mul"]] * 2
    assert matched(run, wanted) == [[1], [2, 3], [4], [5], [6, 7], [8]]
    assert matched(["a"], [["a"], ["a"], ["b"]]) == [[0], [], []]


def test_measured_time_goes_to_the_ops_and_the_rest_is_named() -> None:
    def one(op: str, of: str, cost: Cost) -> Call:
        return Call(op, of, cost, lambda: None)

    found = [
        one("project", "qkv", Cost(0, 100)),
        one("attention", "", Cost(400, 10)),
        one("project", "up", Cost(0, 300)),
    ]
    step = [Owned("mul", 5, 0), Owned("glue", 1, 2), Owned("attend", 3, 0), Owned("mul", 8, 0)]
    run, wanted = Trace(step * 2, 2), [["mul"], ["attend"], ["mul"]]
    rows = table(found, (1e8, 1e9), run, wanted)
    assert [(r["of"], r["floor_us"], r["us"]) for r in rows] == [
        ("qkv", pytest.approx(1.0), 5), ("", pytest.approx(0.4), 3), ("up", pytest.approx(3.0), 8),
    ]  # fmt: skip
    assert others(run, wanted) == [{"name": "glue", "n": 1, "us": 1.0}]


def test_the_table_has_a_line_for_everything(nano: Path) -> None:
    record = roofline(Scene(nano, 16, 64, 1, 4), CPU, "python bench")
    said = lines(record)
    assert len(said) == 1 + len(record["rows"]) + 2
    assert said[0].split()[:3] == ["op", "of", "calls"]
    assert record["others"] is None and record["gaps_us"] is None
    traced = lines(record | {"others": [{"name": "glue", "n": 2, "us": 1.5}], "gaps_us": 2.0, "traced_us": 9.0})
    assert "other       glue" in "\n".join(traced) and len(traced) == len(said) + 4
