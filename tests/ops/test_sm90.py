"""Every kernel as it would be launched compiles for sm_90 without a GPU: it fits into shared memory, and bf16 ones
spill nothing."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from dlx.ops import OPS, linear
from dlx.ops.linear import parts

SHARED_BYTES = 227 << 10  # a program's share on sm_90
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}
STACK_BYTES = {"kv_store": 32}  # the table with which cos and sin reduce large angles
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Memory that is never touched, so that it costs nothing."""
    return torch.empty(*shape, dtype=dtype)


def calls(T: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Each op at the shapes of SDAR-8B with T positions of one row."""
    E, F, H, G, D, V, P, S, W = 4096, 12288, 32, 8, 128, 151936, 80, 16, 80

    def ids(*shape: int) -> Tensor:
        return empty(*shape, dtype=torch.int32)

    def row(*shape: int) -> Tensor:
        return empty(*shape, dtype=torch.float32)

    def x(*shape: int) -> Tensor:
        return empty(*shape, dtype=dtype)

    squares = row(T, parts(E))
    kv = x(2, P, S, G, D)
    view = (ids(1, W), ids(1, T))
    return {
        "qkv": lambda: linear.project_kernel(x(T, E), squares, x((H + 2 * G) * D, E), 1e-6, False),
        "out": lambda: linear.accumulate_kernel(x(T, E), x(E, E), x(T, E), x(E)),
        "gate_up": lambda: linear.project_kernel(x(T, E), squares, x(2 * F, E), 1e-6, True),
        "down": lambda: linear.accumulate_kernel(x(T, F), x(E, F), x(T, E), x(E)),
        "kv_store": lambda: OPS["kv_store"].kernel(
            x(1, T, H + 2 * G, D), x(D), x(D), ids(1, T), row(D // 2), kv, *view, 1e-6
        ),
        "positions": lambda: OPS["positions"].kernel(ids(1), ids(1), 4, T // 4),
        "attention": lambda: OPS["attention"].kernel(x(1, T, H, D), kv, *view, D**-0.5),
        "candidates": lambda: OPS["candidates"].kernel(
            x(T, E), x(V, E), row(T), empty(T, dtype=torch.int64), ids(T), ids(T), 151669, V
        ),
    }


def launches(call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> list[tuple[JITFunction, list, dict]]:
    """The kernels that a call would launch on a GPU, with their arguments."""
    seen: list[tuple[JITFunction, list, dict]] = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        seen.append((self, list(args), options))

    monkeypatch.setattr(JITFunction, "run", record)
    for name in ("attention", "candidates", "kv_store", "linear", "positions"):
        monkeypatch.setattr(import_module(f"dlx.ops.{name}"), "launch_options", lambda x: (True, {}))
    for name in ("attention", "linear"):
        monkeypatch.setattr(import_module(f"dlx.ops.{name}"), "processors", lambda x: 132)
    call()
    monkeypatch.undo()
    return seen


def compiled(kernel: JITFunction, args: list[Any], options: dict[str, Any]) -> Any:
    """The kernel specialised as Triton would on these arguments, for sm_90."""
    signature, constants, aligned = {}, {}, {}
    for i, (param, arg) in enumerate(zip(kernel.params, args, strict=True)):
        if param.is_constexpr or (isinstance(arg, int) and arg == 1):
            signature[param.name], constants[param.name] = "constexpr", arg
        elif isinstance(arg, Tensor):
            signature[param.name], aligned[(i,)] = TYPES[arg.dtype], [["tt.divisibility", 16]]
        elif isinstance(arg, float):
            signature[param.name] = "fp32"
        else:
            signature[param.name] = "i32" if abs(arg) < 2**31 else "i64"
            if arg % 16 == 0:
                aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    known = {k: v for k, v in options.items() if k in ("num_warps", "num_stages")}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=known)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("T", [8, 64, 128])
def test_every_launch_fits_an_sm90(T: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, call in calls(T, dtype).items():
        for kernel, args, options in launches(call, monkeypatch):
            built = compiled(kernel, args, options)
            assert built.metadata.shared <= SHARED_BYTES, (name, built.metadata.shared)
            cubin = tmp_path / "kernel.cubin"
            cubin.write_bytes(built.asm["cubin"])
            dump = [os.fspath(CUOBJDUMP), "--dump-resource-usage", os.fspath(cubin)]
            usage = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
            stack = re.search(r"STACK:(\d+)", usage)
            assert stack is not None, usage
            if dtype == torch.bfloat16:
                assert int(stack[1]) <= STACK_BYTES.get(name, 0), (name, usage)
