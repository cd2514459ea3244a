"""Every op × case, by one set of tests: what an Op value promises holds for each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._functorch import config as functorch
from torch._inductor import config as inductor

from dlx.ops import OPS
from dlx.ops.attention import Launch, launch
from dlx.ops.linear import tiles
from dlx.ops.op import Op

CASES = [(op, name) for op in OPS.values() for name in op.cases()]
IDS = [f"{op.name}: {name}" for op, name in CASES]
each = pytest.mark.parametrize(("op", "case"), CASES, ids=IDS)
# tokens are compared apart: a tie may fall either way in bf16
TOKENS = {"candidates": (0, 2), "candidates_partial": (1, 3), "candidates_combine": (0, 2)}
# the arguments of an op that hold a row each, along their first axis; so do its results
SAMPLED = ("temp", "seed", "pos", "age", "bias_tok", "bias", "top_k", "top_p")
ROWS = {
    "attention": ("q", "pages", "seen", "first", "hole"),
    "candidates": ("h", *SAMPLED),
    "candidates_partial": ("h", *SAMPLED[:-2]),
    "candidates_combine": ("stats", "tok", "top_z", "top_i", *SAMPLED[:4], "top_k", "top_p"),
    "kv_store": ("qkv", "pos", "pages", "seen"),
    "project": ("a", "squares"),
    "accumulate": ("y", "h"),
    "positions": ("start", "open", "given"),
    "route": ("x", "squares", "live"),
    "experts": ("x", "ids", "weights", "squares"),
}
WHOLE = {"experts": (1,)}  # results that tell of the whole batch, by their place
DECIDES = ("choose", "item_rows", "rows_of")  # what functions that decide on a launch are called, or begin with
# from a value in fp8 to the next one, relative and at 0: what lies between them may fall either way
STEPS = {torch.float8_e4m3fn: (2**-3, 2**-9), torch.float8_e5m2: (2**-2, 2**-16)}
MANY = 4  # rows of a batch from which on only some are run alone


def as_dtype(op: Op, args: tuple[Any, ...], dtype: torch.dtype, device: str = "cpu") -> tuple[Any, ...]:
    """The arguments with their activations and weights in `dtype`; per-row numbers and `wide` ones stay fp32."""

    def cast(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        wide = x.is_floating_point() and x.dim() > 1 and (name not in op.wide or dtype == torch.float64)
        wide = wide and x.element_size() > 1  # fp8 stays what it is
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


def same(a: Tensor, b: Tensor) -> bool:
    """The same shape and bits, those of NaN among them."""
    return a.shape == b.shape and torch.equal(*(x.flatten().view(torch.uint8) for x in (a, b)))


def run(fn: Any, op: Op, args: tuple[Any, ...]) -> list[Tensor]:
    """What `fn` returns and what it writes, as one list."""
    out = fn(*args)
    out = [out] if isinstance(out, Tensor) else list(out or ())
    names = list(op.reference.__annotations__)
    return out + [args[names.index(name)] for name in op.mutates]


class Ran(NamedTuple):
    """A run: its arguments before and after, what it returned and wrote, and the launches that it chose."""

    before: tuple[Any, ...]
    after: tuple[Any, ...]
    results: list[Tensor]
    chosen: dict[Any, list[Any]]


def choosers() -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """The functions of the ops that decide on a launch configuration, wherever they are known."""
    for name, module in list(sys.modules.items()):
        if name.startswith("dlx.ops."):
            for key, value in list(vars(module).items()):
                if key.startswith(DECIDES) and callable(value):
                    yield module, key, value


def noted(fn: Any, op: Op, args: tuple[Any, ...]) -> Ran:
    """Run `fn` on a copy of the arguments, and note what it chose."""
    chosen: dict[Any, list[Any]] = {}
    after = clone(args)
    with pytest.MonkeyPatch.context() as patch:
        for module, key, choose in choosers():

            def note(*a: Any, choose: Any = choose, **k: Any) -> Any:
                config = choose(*a, **k)
                chosen.setdefault(choose, []).append(config)
                return config

            patch.setattr(module, key, note)
        return Ran(args, after, run(fn, op, after), chosen)


@cache
def interpreted(op: Op, case: str) -> Ran:
    """The kernel in fp32 and the interpreter, which is slow: run once for all that is asked of it."""
    return noted(op.kernel, op, op.cases()[case])


def check(op: Op, args: tuple[Any, ...], fn: Any) -> None:
    """`fn` on `args` agrees with the reference on the same values in fp64."""
    agree(op, args, run(fn, op, clone(args)))


def agree(op: Op, args: tuple[Any, ...], results: list[Tensor]) -> None:
    """The results for `args` agree with the reference on the same values in fp64."""
    host = tuple(x.cpu() if isinstance(x, Tensor) else x for x in args)
    want = run(op.reference, op, as_dtype(op, clone(host), torch.float64))
    exact = all(x.dtype != torch.bfloat16 for x in args if isinstance(x, Tensor))
    rtol, atol = (1e-5, 1e-5) if exact and op.rtol else (op.rtol, op.atol)
    for i, (g, w) in enumerate(zip((x.cpu() for x in results), want, strict=True)):
        if i in TOKENS.get(op.name, ()):
            assert exact is False or torch.equal(g, w)
        else:
            near = STEPS.get(g.dtype, (rtol, atol))
            torch.testing.assert_close(g.double(), w.double(), rtol=near[0], atol=near[1], equal_nan=True)


def check_twice(one: Ran, fn: Any, op: Op) -> None:
    """Another run of `fn` on the same arguments gives the same bits."""
    for a, b in zip(one.results, run(fn, op, clone(one.before)), strict=True):
        assert same(a, b)


def check_writes(one: Ran, op: Op) -> None:
    """A run wrote to no argument but those that the op declares."""
    for name, old, new in zip(op.reference.__annotations__, one.before, one.after, strict=False):
        if isinstance(old, Tensor) and name not in op.mutates:
            assert same(old, new), name


def check_rows(batch: Ran, op: Op) -> None:
    """Rows alone, under the configurations that the batch chose, give the bits that they give in the batch."""
    args = batch.before
    names = list(op.reference.__annotations__)[: len(args)]
    mine = [name in ROWS[op.name] and x is not None for name, x in zip(names, args, strict=True)]
    rows = next(len(x) for x, cut in zip(args, mine, strict=True) if cut)
    alone = clone(args)
    for i in range(rows) if rows <= MANY or op.mutates else (rows // 2, rows - 1):
        one = tuple(x[i : i + 1].contiguous() if cut else x for x, cut in zip(alone, mine, strict=True))
        again = {choose: iter(configs) for choose, configs in batch.chosen.items()}
        with pytest.MonkeyPatch.context() as patch:
            for module, key, choose in choosers():
                if choose in again:
                    patch.setattr(module, key, lambda *a, turn=again[choose], **k: next(turn))
            got = run(op.kernel, op, one)
        for at, (g, w) in enumerate(zip(got, batch.results[: len(got) - len(op.mutates)], strict=False)):
            assert at in WHOLE.get(op.name, ()) or same(g[0], w[i]), f"row {i}"
    for name in op.mutates:  # all rows were run, one after the other, on the same tensor
        at = names.index(name)
        assert same(alone[at], batch.after[at]), name


@each
def test_the_registered_op_passes_opcheck(op: Op, case: str) -> None:
    args = op.cases()[case]
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if any(isinstance(x, Tensor) and x.is_floating_point() and x.element_size() == 1 for x in args):
        tests.remove("test_schema")  # it compares the arguments, and fp8 cannot be compared on a CPU
    torch.library.opcheck(getattr(torch.ops.dlx, op.name).default, args, test_utils=tests)


@each
def test_the_fake_has_the_strides_of_the_result(op: Op, case: str) -> None:
    args = op.cases()[case]
    real, fake = op.reference(*clone(args)), op.fake(*args)
    real, fake = ([x] if isinstance(x, Tensor) else list(x or ()) for x in (real, fake))
    assert [(x.shape, x.stride(), x.dtype) for x in real] == [(x.shape, x.stride(), x.dtype) for x in fake]


@each
def test_the_reference_in_fp32_agrees_with_itself_in_fp64(op: Op, case: str) -> None:
    check(op, op.cases()[case], op.reference)


def compiled(op: Op) -> Callable[..., Any]:
    """The op through Inductor; cached graphs are left alone, as they outlive a change of the op's fake."""
    torch._dynamo.reset()  # one code object for all ops and cases: its recompile limit is not what is tested

    def call(*args: Any) -> Any:
        with inductor.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
            return torch.compile(op, fullgraph=True, dynamic=False)(*args)

    return call


@each
def test_the_compiled_op_gives_the_same_bits_as_the_eager_one(op: Op, case: str) -> None:
    args = op.cases()[case]
    for a, b in zip(run(compiled(op), op, clone(args)), run(op, op, clone(args)), strict=True):
        assert same(a, b)


@each
def test_only_declared_arguments_are_written(op: Op, case: str) -> None:
    check_writes(noted(op, op, op.cases()[case]), op)


@each
def test_the_cost_counts_work(op: Op, case: str) -> None:
    cost = op.cost(*op.cases()[case])
    assert cost.bytes > 0 and cost.flops >= 0


@pytest.mark.interp
@each
def test_the_interpreted_kernel_agrees_with_the_reference(op: Op, case: str) -> None:
    agree(op, interpreted(op, case).before, interpreted(op, case).results)


@pytest.mark.interp
@each
def test_the_interpreted_kernel_agrees_with_the_reference_in_bf16(op: Op, case: str) -> None:
    check(op, as_dtype(op, op.cases()[case], torch.bfloat16), op.kernel)


@pytest.mark.interp
@each
def test_the_interpreted_kernel_writes_only_what_it_declares(op: Op, case: str) -> None:
    check_writes(interpreted(op, case), op)


@pytest.mark.interp
@each
def test_the_interpreted_kernel_gives_the_same_bits_twice(op: Op, case: str) -> None:
    check_twice(interpreted(op, case), op.kernel, op)


@pytest.mark.interp
@each
def test_an_interpreted_row_alone_equals_the_row_in_a_batch(op: Op, case: str) -> None:
    check_rows(interpreted(op, case), op)


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
    config = tiles.Tiles(BN=64, BK=32, splits=splits, warps=4, stages=2)
    if kind == 2:
        args = OPS["accumulate"].cases()["few rows"]
        check(OPS["accumulate"], args, lambda y, w, h, g, s, b: tiles.launch(2, y, w, None, h, g, 0.0, s, b, config))
        return
    args = OPS["project"].cases()["swiglu" if kind else "plain"]
    check(
        OPS["project"],
        args,
        lambda a, q, w, e, _, s, b: tiles.launch(kind, a, w, q, None, None, e, s, b, config)[0],
    )


@pytest.mark.gpu
@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("how", ["eager", "compiled", "captured"])
def test_the_kernel_agrees_with_the_reference_on_a_gpu(op: Op, case: str, dtype: torch.dtype, how: str) -> None:
    args = as_dtype(op, op.cases()[case], dtype, "cuda")
    if how == "eager":
        return check(op, args, op)
    if how == "compiled":
        return check(op, args, compiled(op))

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


def on_gpu(op: Op, case: str) -> Ran:
    """The kernel in bf16 on the GPU."""
    return noted(op.kernel, op, as_dtype(op, op.cases()[case], torch.bfloat16, "cuda"))


@pytest.mark.gpu
@each
def test_the_kernel_gives_the_same_bits_twice(op: Op, case: str) -> None:
    check_twice(on_gpu(op, case), op, op)


@pytest.mark.gpu
@each
def test_the_kernel_writes_only_what_it_declares(op: Op, case: str) -> None:
    check_writes(on_gpu(op, case), op)


@pytest.mark.gpu
@each
def test_a_row_alone_equals_the_row_in_a_batch(op: Op, case: str) -> None:
    check_rows(on_gpu(op, case), op)


def test_every_op_says_which_arguments_hold_rows() -> None:
    assert set(ROWS) == set(OPS)
    for name, rows in ROWS.items():
        assert set(rows) <= set(OPS[name].reference.__annotations__)
