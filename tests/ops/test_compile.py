"""Every kernel as the bench launches it compiles for sm_80, sm_86 and sm_90 without a GPU: it fits into shared memory,
and bf16 ones spill nothing. So do the recorded configurations of each GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dlx.ops import OPS, tuned
from dlx.ops.bench import case, dense, mixture, paged
from dlx.ops.bench.__main__ import SUITES
from dlx.ops.bench.case import Case
from dlx.ops.bench.search import forget
from dlx.ops.bench.shapes import SHAPES
from dlx.ops.op import Op, launch_options, processors, shared_limit

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
STACK_BYTES = {"_kv_store": 32}  # the table with which cos and sin reduce large angles
# all of them at sm_90, which they are tuned for; one elsewhere, where the defaults are of one family
MODELS = {80: ("dream-7b",), 86: ("llada2-mini",), 90: ("sdar-8b", "llada2-mini", "dream-7b")}
OF_SUITE = {"moe": ("llada2-mini", "sdar-30b-a3b"), "linear_fp8": ("sdar-8b",)}
E4M3 = ("linear_fp8", "attention_fp8")
WIDE_ROWS = (4, 32)  # positions of a forward at which fp32 kernels are compiled


class Target(NamedTuple):
    """A GPU that is not there: as torch describes it, and the share of shared memory that a program may take."""

    capability: tuple[int, int]
    processors: int
    shared_bytes: int
    name: str = ""

    @property
    def arch(self) -> int:
        return 10 * self.capability[0] + self.capability[1]


# sm_80 has 163 KiB; the ops take no more of it than of sm_86
TARGETS = [Target((8, 0), 108, 99 << 10), Target((8, 6), 84, 99 << 10), Target((9, 0), 132, 227 << 10)]


def recorded() -> list[Target]:
    """A target for each GPU with recorded configurations."""
    folders = {file.parent: json.loads(file.read_text()) for file in sorted(tuned.folder().glob("*/*.json"))}
    known = {target.capability: target for target in TARGETS}
    return [known[tuple(value["capability"])]._replace(name=value["gpu"]) for value in folders.values()]


class OnGpu(Tensor):
    """Memory that is never touched and says that it lies on a GPU."""

    @property
    def is_cuda(self) -> bool:
        return True


def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*size, dtype=dtype).as_subclass(OnGpu)


class Driver:
    """Triton's driver of a target: it says what to compile for, and launches nothing."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.target.arch, 32)

    def get_current_device(self) -> int:
        return hash(self.target)  # kernels are remembered by device

    def get_current_stream(self, device: int) -> int:
        return 0


class Launched(NamedTuple):
    name: str
    shared_bytes: int
    cubin: bytes
    pdl: bool


Launches = Callable[[Callable[[], Any]], list[Launched]]


@pytest.fixture
def pretended(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch and Triton take the target for the GPU of this machine."""
    target: Target = request.getfixturevalue("target")
    shared = 163 << 10 if target.arch == 80 else target.shared_bytes
    facts = {"multi_processor_count": target.processors, "shared_memory_per_block_optin": shared}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: target.capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(**facts))
    before = driver._active
    driver.set_active(Driver(target))  # type: ignore[arg-type]
    yield
    driver._active = before


@pytest.fixture
def launches(pretended: None, monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Runs ops as if the target were there, and gives each kernel that would be launched, compiled."""
    seen: list[Launched] = []
    launch = JITFunction.run

    def compiled(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        pdl = bool(options.get("launch_pdl"))
        seen.append(Launched(self.__name__, kernel.metadata.shared, kernel.asm["cubin"], pdl))

    def run(call: Callable[[], Any]) -> list[Launched]:
        seen.clear()
        call()
        return list(seen)

    monkeypatch.setattr(JITFunction, "run", compiled)
    return run


def untouched(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """The bench's inputs are memory that is never touched, and its ops run their kernels."""
    for module in (case, dense, mixture, paged):
        monkeypatch.setattr(module, "normal", lambda device, *size, scale=1.0: empty(*size, dtype=dtype))
        if hasattr(module, "copies"):
            monkeypatch.setattr(module, "copies", lambda read_bytes: 2)
    monkeypatch.setattr(
        dense, "in_fp8", lambda w: (empty(*w.shape, dtype=torch.float8_e4m3fn), empty(len(w), dtype=torch.float32))
    )
    monkeypatch.setattr(Op, "__call__", lambda self, *args: (self.check(*args), self.kernel(*args))[1])


def launched(cases: Iterable[Case], launches: Launches) -> Iterator[tuple[Case, Launched]]:
    """What the bench would launch for its cases."""
    for one in cases:
        for kernel in launches(lambda one=one: one.build(torch.device("cpu")).own(0)):
            yield one, kernel


def more(target: Target) -> dict[str, Callable[[], Any]]:
    """What the bench does not time: other head dims, windows, holes, fp8 pages, filters, parts of a vocabulary."""
    fp8 = torch.float8_e5m2 if target.capability < (8, 9) else torch.float8_e4m3fn
    T, G, S, W, E, V = 32, 4, 16, 64, 2048, 32000

    def ids(*size: int) -> Tensor:
        return empty(*size, dtype=torch.int32)

    def f32(*size: int) -> Tensor:
        return empty(*size, dtype=torch.float32)

    def attention(D: int, dtype: torch.dtype, *windows: Tensor | None) -> Callable[[], Any]:
        q, kv = empty(2, T, 4 * G, D), empty(2, 2 * W, S, G, D, dtype=dtype)
        return lambda: OPS["attention"].kernel(q, kv, ids(2, W), ids(2, T), D**-0.5, *windows)

    def sampled(op: str, *ends: int, T: int = T) -> Callable[[], Any]:
        h, head = empty(T, E), empty(V, E)
        rows = (f32(T), empty(T, dtype=torch.int64), ids(T), ids(T))
        rest = (8, True, 30.0) if op == "candidates_partial" else (5, True, True, 30.0)
        filters = () if op == "candidates_partial" else (ids(T), f32(T))
        return lambda: OPS[op].kernel(h, head, *rows, *ends, *rest, ids(T, 3), f32(T, 3), *filters, ids(4))

    scales = f32(2, 2 * W, G)
    qkv, kv = empty(2, T, 6 * G, 128), empty(2, 2 * W, S, G, 128, dtype=fp8)
    places = (ids(2, T), f32(32), kv, ids(2, W), ids(2, T))
    return {
        "attention, heads of 64": attention(64, torch.bfloat16),
        "attention, heads of 256": attention(256, torch.bfloat16, ids(2, T)),
        "attention, heads of 512": attention(512, torch.bfloat16, ids(2, T), ids(2, 2)),
        "attention, fp8 pages": attention(128, fp8, ids(2, T), ids(2, 2), scales),
        "kv_store, fp8 pages": lambda: OPS["kv_store"].kernel(qkv, None, None, *places, 1e-6, scales, True),
        "candidates, filtered": sampled("candidates", V - 1, V),
        "candidates, filtered, many rows": sampled("candidates", V - 1, V, T=512),
        "candidates, a part": sampled("candidates_partial", V - 1, 7, V),
        "positions": lambda: OPS["positions"].kernel(ids(2), ids(2), 4, 8),
        "positions, given": lambda: OPS["positions"].kernel(ids(2), ids(2), 4, 8, ids(2)),
    }


def stack_bytes(cubin: bytes, folder: Path) -> int:
    """What a thread keeps in local memory."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    dump = [os.fspath(CUOBJDUMP), "--dump-resource-usage", os.fspath(file)]
    usage = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+)", usage)
    assert found is not None, usage
    return int(found[1])


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"sm_{t.arch}")
@pytest.mark.usefixtures("pretended")
def test_a_target_is_what_the_ops_take_it_for(target: Target) -> None:
    x = empty(1)
    assert (processors(x), shared_limit(x)) == (target.processors, target.shared_bytes)
    assert launch_options(x)[0] == (target.arch == 90)


@pytest.mark.slow
@pytest.mark.parametrize("suite", [*SUITES])
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"sm_{t.arch}")
def test_every_launch_of_the_bench_fits(
    target: Target, suite: str, launches: Launches, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if suite in E4M3 and target.capability < (8, 9):
        pytest.skip("e4m3 needs sm_89")
    untouched(monkeypatch, torch.bfloat16)
    models = OF_SUITE.get(suite, MODELS[target.arch])
    checked: set[bytes] = set()
    for one, kernel in launched([c for model in models for c in SUITES[suite].cases(model)], launches):
        assert kernel.shared_bytes <= target.shared_bytes, (one, kernel.name)
        assert not kernel.pdl or target.arch >= 90
        if target.arch == 90 and kernel.cubin not in checked:
            checked.add(kernel.cubin)
            assert stack_bytes(kernel.cubin, tmp_path) <= STACK_BYTES.get(kernel.name, 0), (one, kernel.name)


@pytest.mark.slow
@pytest.mark.parametrize("suite", [name for name in SUITES if name != "linear_fp8"])
@pytest.mark.parametrize("target", TARGETS[1:], ids=lambda t: f"sm_{t.arch}")
def test_every_launch_in_fp32_fits(
    target: Target, suite: str, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    if suite in E4M3 and target.capability < (8, 9):
        pytest.skip("e4m3 needs sm_89")
    untouched(monkeypatch, torch.float32)
    cases = [one for one in SUITES[suite].cases("llada2-mini") if one.rows in WIDE_ROWS]
    for one, kernel in launched(cases, launches):
        assert kernel.shared_bytes <= target.shared_bytes, (one, kernel.name)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"sm_{t.arch}")
def test_every_feature_fits(target: Target, launches: Launches) -> None:
    for name, call in more(target).items():
        kernels = launches(call)
        assert kernels, name
        assert all(kernel.shared_bytes <= target.shared_bytes for kernel in kernels), name


@pytest.mark.slow
@pytest.mark.parametrize("target", recorded(), ids=lambda t: t.name)
@pytest.mark.usefixtures("pretended")
def test_no_recorded_configuration_is_passed_over(
    target: Target, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: target.name)
    monkeypatch.setattr(JITFunction, "run", lambda *args, **options: None)
    untouched(monkeypatch, torch.bfloat16)
    forget()  # what was chosen without records
    for suite in SUITES.values():
        for model in SHAPES:
            for one in suite.cases(model):
                one.build(torch.device("cpu")).own(0)
    forget()
    assert not caplog.records
