"""Every op × case, by one set of tests: what an Op value promises holds for each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dlx.ops import OPS, linear
from dlx.ops.attention import Launch, choose, launch
from dlx.ops.op import Op

CASES = [(op, name) for op in OPS.values() for name in op.cases()]
IDS = [f"{op.name}: {name}" for op, name in CASES]
each = pytest.mark.parametrize(("op", "case"), CASES, ids=IDS)
# tokens are compared apart: a tie may fall either way in bf16
TOKENS = {"candidates": 0}


def as_dtype(op: Op, args: tuple[Any, ...], dtype: torch.dtype, device: str = "cpu") -> tuple[Any, ...]:
    """The arguments with their activations and weights in `dtype`; per-row numbers and `wide` ones stay fp32."""

    def cast(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        wide = x.is_floating_point() and x.dim() > 1 and (name not in op.wide or dtype == torch.float64)
        strided = torch.empty_strided(x.shape, x.stride(), dtype=dtype if wide else x.dtype, device=device)
        return strided.copy_(x)

    return tuple(cast(name, x) for name, x in zip(op.reference.__annotations__, args, strict=False))


def clone(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
        if isinstance(x, Tensor)
        else x
        for x in args
    )


def run(fn: Any, op: Op, args: tuple[Any, ...]) -> list[Tensor]:
    """What `fn` returns and what it writes, as one list."""
    out = fn(*args)
    out = [out] if isinstance(out, Tensor) else list(out or ())
    names = list(op.reference.__annotations__)
    return out + [args[names.index(name)] for name in op.mutates]


def check(op: Op, args: tuple[Any, ...], fn: Any) -> None:
    """`fn` on `args` agrees with the reference on the same values in fp64."""
    want = run(
        op.reference,
        op,
        as_dtype(op, clone(tuple(x.cpu() if isinstance(x, Tensor) else x for x in args)), torch.float64),
    )
    got = [x.cpu() for x in run(fn, op, clone(args))]
    exact = all(x.dtype != torch.bfloat16 for x in args if isinstance(x, Tensor))
    rtol, atol = (1e-5, 1e-5) if exact and op.rtol else (op.rtol, op.atol)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        if TOKENS.get(op.name) == i:
            assert exact is False or torch.equal(g, w)
        else:
            torch.testing.assert_close(g.double(), w.double(), rtol=rtol, atol=atol, equal_nan=True)


@each
def test_the_registered_op_passes_opcheck(op: Op, case: str) -> None:
    torch.library.opcheck(getattr(torch.ops.dlx, op.name).default, op.cases()[case])


@each
def test_the_fake_has_the_strides_of_the_result(op: Op, case: str) -> None:
    args = op.cases()[case]
    real, fake = op.reference(*clone(args)), op.fake(*args)
    real, fake = ([x] if isinstance(x, Tensor) else list(x or ()) for x in (real, fake))
    assert [(x.shape, x.stride(), x.dtype) for x in real] == [(x.shape, x.stride(), x.dtype) for x in fake]


@each
def test_the_reference_in_fp32_agrees_with_itself_in_fp64(op: Op, case: str) -> None:
    check(op, op.cases()[case], op.reference)


@each
def test_only_declared_arguments_are_written(op: Op, case: str) -> None:
    args = op.cases()[case]
    before = clone(args)
    op(*args)
    for name, old, new in zip(op.reference.__annotations__, before, args, strict=False):
        if isinstance(old, Tensor) and name not in op.mutates:
            assert torch.equal(old.nan_to_num(), new.nan_to_num()), name


@each
def test_the_cost_counts_work(op: Op, case: str) -> None:
    cost = op.cost(*op.cases()[case])
    assert cost.bytes > 0 and cost.flops >= 0


@pytest.mark.interp
@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_interpreted_kernel_agrees_with_the_reference(op: Op, case: str, dtype: torch.dtype) -> None:
    check(op, as_dtype(op, op.cases()[case], dtype), op.kernel)


@pytest.mark.interp
@each
def test_the_interpreted_kernel_writes_only_what_it_declares(op: Op, case: str) -> None:
    args = op.cases()[case]
    before = clone(args)
    op.kernel(*args)
    for name, old, new in zip(op.reference.__annotations__, before, args, strict=False):
        if isinstance(old, Tensor) and name not in op.mutates:
            assert torch.equal(old.nan_to_num(), new.nan_to_num()), name


@pytest.mark.interp
@pytest.mark.parametrize("splits", [1, 2, 4])
def test_attention_is_the_same_for_any_split_of_the_keys(splits: int) -> None:
    args = OPS["attention"].cases()["group of 7, page of 32"]
    config = Launch(BM=32, BN=16, splits=splits, warps=4, stages=2)
    check(OPS["attention"], args, lambda *a: launch(*a, config))


@pytest.mark.interp
@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize("kind", [0, 1, 2], ids=["project", "swiglu", "accumulate"])
def test_a_matmul_is_the_same_for_any_split_of_its_depth(kind: int, splits: int) -> None:
    config = linear.Launch(BN=64, BK=32, splits=splits, warps=4, stages=2)
    if kind == 2:
        args = OPS["accumulate"].cases()["few rows"]
        check(OPS["accumulate"], args, lambda y, w, h, g: linear.launch(2, y, w, None, h, g, 0.0, config))
        return
    args = OPS["project"].cases()["swiglu" if kind else "plain"]
    check(OPS["project"], args, lambda a, q, w, e, s: linear.launch(kind, a, w, q, None, None, e, config)[0])


@pytest.mark.gpu
@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("how", ["eager", "compiled", "captured"])
def test_the_kernel_agrees_with_the_reference_on_a_gpu(op: Op, case: str, dtype: torch.dtype, how: str) -> None:
    args = as_dtype(op, op.cases()[case], dtype, "cuda")
    if how == "eager":
        return check(op, args, op)
    if how == "compiled":
        torch._dynamo.reset()  # one code object for all ops and cases: its recompile limit is not what is tested
        return check(op, args, torch.compile(op, fullgraph=True, dynamic=False))

    def captured(*static: Any) -> Any:
        op(*clone(static))  # warm up on copies: a mutating op must run once
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = op(*static)
        graph.replay()
        torch.cuda.synchronize()
        return out

    return check(op, args, captured)


@pytest.mark.gpu
@each
def test_the_kernel_gives_the_same_bits_twice(op: Op, case: str) -> None:
    args = as_dtype(op, op.cases()[case], torch.bfloat16, "cuda")
    one, two = run(op, op, clone(args)), run(op, op, clone(args))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.gpu
def test_an_attention_row_alone_equals_the_row_in_a_batch() -> None:
    q, kv, pages, seen, scale = as_dtype(
        OPS["attention"], OPS["attention"].cases()["ragged rows"], torch.bfloat16, "cuda"
    )
    config = choose(*q.shape[:3], kv.shape[3], 64, 132)
    batch = launch(q, kv, pages, seen, scale, config)
    for b in range(q.shape[0]):
        cut = slice(b, b + 1)
        alone = launch(q[cut].contiguous(), kv, pages[cut].contiguous(), seen[cut].contiguous(), scale, config)
        assert torch.equal(batch[cut], alone)
