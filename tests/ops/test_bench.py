"""The bench of the ops: its arithmetic, its cases at a small size, and its command on a machine without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.jit import JITFunction

from dlx.ops import OPS
from dlx.ops.bench import dense, mixture, paged
from dlx.ops.bench.__main__ import SUITES, main
from dlx.ops.bench.case import Case
from dlx.ops.bench.chain import COLD_BYTES, LONGEST, Built, Took, copies, length
from dlx.ops.bench.report import Result, Roof, cells, means, result, share
from dlx.ops.bench.shapes import SHAPES, Experts, Shape, matmuls
from dlx.ops.op import Cost

ROOT = Path(__file__).parents[2]
SMALL = Shape(
    3, 128, 192, 4, 2, 320, block=4, D=32, rotary=16, qkv_bias=True,
    experts=Experts(8, 2, 64, shared=1, dense_layers=1, groups=4, top_groups=2, sigmoid=True, scaling=2.5),
)  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> str:
    """A shape whose cases run on a CPU, through the references."""
    monkeypatch.setitem(SHAPES, "small", SMALL)
    for module in (dense, mixture, paged):
        monkeypatch.setattr(module, "copies", lambda read_bytes: 2)
    monkeypatch.setattr(dense, "LINEAR_ROWS", (4,))
    monkeypatch.setattr(dense, "HEAD_ROWS", (4,))
    monkeypatch.setattr(dense, "TOP_ROWS", (4,))
    monkeypatch.setattr(JITFunction, "run", lambda *args, **options: None)  # `bare` is a kernel without a reference
    monkeypatch.setattr(mixture, "ROWS", (4, 32))
    monkeypatch.setattr(paged, "CONTEXTS", (24,))
    monkeypatch.setattr(paged, "FP8_CONTEXTS", (24,))
    monkeypatch.setattr(paged, "PROMPTS", (32,))
    monkeypatch.setattr(paged, "BATCH", (3, 8, 40))
    torch.manual_seed(0)
    return "small"


def built(suite: str, name: str) -> list[tuple[Case, Built]]:
    return [(case, case.build(torch.device("cpu"))) for case in SUITES[suite].cases(name)]


@pytest.mark.parametrize("suite", [*SUITES])
def test_every_case_and_its_alternatives_run(suite: str, small: str) -> None:
    for case, one in built(suite, small):
        for i in range(one.copies):
            own = one.own(i)
            for x in own if isinstance(own, tuple) else (own,):
                assert isinstance(x, torch.Tensor) and bool(x.isfinite().all()), case
        for call in one.others.values():
            call(1)
        assert one.cost.bytes > 0, case


def test_the_eager_sampler_gives_what_the_op_gives(small: str) -> None:
    (_, one) = built("candidates", small)[0]
    tok, conf, *_ = one.own(1)  # type: ignore[misc]
    likely, ids = one.others["torch"](1)  # type: ignore[misc]
    assert torch.equal(tok, ids[:, 0].int())
    torch.testing.assert_close(conf, likely[:, 0], rtol=2e-2, atol=1e-3)


def test_the_eager_sampler_lists_what_the_op_lists(small: str) -> None:
    for _, one in built("candidates_topk", small):
        *_, likely, _, _ = one.own(1)  # type: ignore[misc]
        torch.testing.assert_close(likely, one.others["torch"](1)[0], rtol=2e-2, atol=1e-3)  # type: ignore[index]


def test_attention_over_fp8_pages_gives_nearly_what_it_gives_over_bf16_pages(small: str) -> None:
    for _, one in built("attention_fp8", small):
        want = one.others["bf16"](1)
        assert (one.own(1) - want).norm() < 0.1 * want.norm()  # type: ignore[operator]


def test_the_grouped_matmuls_give_what_the_experts_give(small: str) -> None:
    for case, one in built("moe", small):
        if case.name == "experts":
            y, distinct = one.own(1)  # type: ignore[misc]
            torch.testing.assert_close(one.others["grouped_mm"](1), y, rtol=3e-2, atol=2e-2)
            assert 0 < distinct <= 9


def test_the_experts_cost_counts_those_touched(small: str) -> None:
    (_, few), (_, many) = [(c, b) for c, b in built("moe", small) if c.name == "experts"]
    touched = few.facts["experts touched"]
    assert isinstance(touched, float) and 3 <= touched <= 9
    each = 3 * 128 * 64 * 2
    assert touched * each <= few.cost.bytes < (touched + 1) * each
    assert many.facts["experts touched"] == 9  # 32 tokens of two choices, and the shared one


@pytest.mark.parametrize("name", ["sdar-1.7b", "sdar-4b", "sdar-8b"])
def test_the_shapes_are_those_of_the_configs(name: str) -> None:
    config = json.loads((ROOT / "dlx" / "bench" / "shapes" / f"{name}.json").read_text())
    shape = SHAPES[name]
    assert (shape.layers, shape.E, shape.F) == tuple(
        config[key] for key in ("num_hidden_layers", "hidden_size", "intermediate_size")
    )
    assert (shape.H, shape.G, shape.D, shape.V, shape.block) == tuple(
        config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "block_size")
    )


def test_a_dense_model_has_four_matmuls_a_layer_and_a_mixture_those_of_its_dense_layers() -> None:
    assert [(m.name, m.N, m.K, m.layers) for m in matmuls(SHAPES["sdar-8b"])] == [
        ("qkv", 6144, 4096, 36), ("out", 4096, 4096, 36), ("gate_up", 24576, 4096, 36), ("down", 4096, 12288, 36),
    ]  # fmt: skip
    assert [(m.name, m.layers) for m in matmuls(SHAPES["llada2-mini"])] == [
        ("qkv", 20), ("out", 20), ("gate_up", 1), ("down", 1),
    ]  # fmt: skip
    assert [m.name for m in matmuls(SHAPES["sdar-30b-a3b"])] == ["qkv", "out"]


@pytest.mark.parametrize("read_bytes", [1, 60_000, 2_000_000, 50_000_000, 1_240_000_000])
def test_inputs_rotate_over_more_than_a_cache(read_bytes: int) -> None:
    n = copies(read_bytes)
    assert 2 <= n <= LONGEST
    assert n * read_bytes >= COLD_BYTES or n == LONGEST
    assert (n - 1) * read_bytes < COLD_BYTES or n == 2


@pytest.mark.parametrize(("n", "bytes_"), [(4, 50_000_000), (3000, 60_000), (2, 3_000_000_000)])
def test_a_chain_is_whole_turns_through_its_inputs(n: int, bytes_: int) -> None:
    calls = length(Built(lambda i: None, {}, n, Cost(0, bytes_)))
    assert calls % n == 0
    assert 0 < calls <= LONGEST


def timed(case: str, us: float, layers: int, of_read: float, **others: float) -> Result:
    return Result("linear", "m", case, 4, layers, 0, 0, us, us, us, of_read, 0.0, others=others)


def test_means_are_weighted_by_traffic() -> None:
    # at 1 byte a µs of bandwidth: 80 bytes in 100 µs in ten layers, 10 bytes in 20 µs once
    results = [timed("qkv", 100, 10, 0.8, cuBLAS=110.0), timed("head", 20, 1, 0.5, cuBLAS=20.0, torch=60.0)]
    (mean,) = means(results)
    assert (mean["shape"], mean["rows"], mean["matmuls"]) == ("m", 4, 0.8)
    assert mean["and_head"] == pytest.approx(90 / 120)
    assert mean["step"] == pytest.approx(810 / 1020)
    assert mean["times"] == {"cuBLAS": pytest.approx(1120 / 1020)}


def test_without_a_head_there_is_no_step() -> None:
    (mean,) = means([timed("qkv", 100, 10, 0.8), timed("out", 300, 10, 0.4)])
    assert mean["matmuls"] == pytest.approx(0.5) == share([timed("qkv", 100, 1, 0.8), timed("out", 300, 1, 0.4)])
    assert (mean["and_head"], mean["step"]) == (None, None)


def test_a_share_is_of_the_roof_that_binds() -> None:
    case = Case("attention", "m", "a", 4, lambda device: Built(lambda i: None, {}, 2, Cost(0, 0)))
    cost = Cost(flops=3_000_000, bytes=1_000_000)
    r = result(case, Built(lambda i: None, {}, 2, cost), Took(2.0, 1.9, 2.1), Roof(1e12, 2e12))
    assert (r.of_read, r.of_matmul, r.of_roof) == pytest.approx((0.5, 0.75, 0.75))
    assert cells(r) == ("attention", "m", "a", "4", "2.00", "500", "1.5", "75.0 %", "")


@pytest.mark.parametrize("op", [None, "linear", "moe"])
def test_on_a_cpu_the_references_run_on_their_cases(
    op: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ops.json"
    assert main([*([op] if op else []), "--device", "cpu", "--json", str(file)]) == 0
    names = SUITES[op].ops if op else tuple(OPS)
    want = [(name, case) for name in names for case in OPS[name].cases()]
    record: dict[str, Any] = json.loads(file.read_text())
    assert [(r["op"], r["case"]) for r in record["results"]] == want
    assert all(r["us"] > 0 and r["of_roof"] is None for r in record["results"])
    assert {"commit", "torch", "triton", "date", "command", "machine"} <= set(record["made"])
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(want)


def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["attention"]) == 2
    assert "no CUDA device; --device cpu" in capsys.readouterr().err
