"""Exports: a graph that was recorded runs in another place without a compiler; what does not fit is compiled."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dlx import caches, exports, recorder
from dlx.exports import Export, Exports, reached
from dlx.graphs.capture import compiled
from dlx.models.layers import RMSNorm
from dlx.recorder import Recorder, exported

CPU = torch.device("cpu")
HIDDEN = torch.ones(4)


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


def grown(pair: Pair, by: int) -> None:
    pair.x.add_(pair.y * by)


def grown_by_what_is_hidden(pair: Pair) -> None:
    pair.x.add_(HIDDEN + pair.y)


def grown_by_others(pair: Pair) -> None:
    pair.x.add_(1 + pair.y)


def told(pair: Pair) -> Tensor:
    return pair.x + pair.y


def pair(n: int = 4, at: int = 0) -> Pair:
    return Pair(torch.zeros(n + at)[at:], torch.arange(n, dtype=torch.float32))


class Made(NamedTuple):
    recorder: Recorder
    folder: Path  # as that of a pack
    lasting: object


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """`grown` by 2, exported; its first run is the recorder's."""
    place, folder = tmp_path_factory.mktemp("caches"), tmp_path_factory.mktemp("pack")
    with caches.empty(place), pytest.MonkeyPatch.context() as patch:
        patch.setattr(exports, "OURS", exports.OURS | {"tests"})
        record, fn = Recorder(), partial(grown, pair(), 2)
        record.graph(fn)()
        for name, data in caches.collected(place, artefacts=False).items():
            caches.write(folder / name, data)
        yield Made(record, folder, fn)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "compiled", lambda fn, **_: pytest.fail(f"{fn} is compiled"))


@pytest.fixture
def instead(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What is compiled after all."""
    asked: list[object] = []
    monkeypatch.setattr(exports, "compiled", lambda fn, **_: asked.append(fn) or fn)
    return asked


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_graph_serves_other_tensors_of_the_same_form(made: Made, no_compiler: None) -> None:
    assert not made.recorder.left_out
    (a, b), ready = (pair(), pair()), Exports(made.recorder.exports, made.folder)
    runs = [ready.graph(partial(grown, p, 2)) for p in (a, b)]
    b.y.mul_(10)
    for run in (*runs, runs[1]):
        run()
    assert a.x.tolist() == [0, 2, 4, 6]
    assert b.x.tolist() == [0, 40, 80, 120]


def test_an_export_names_no_path_of_the_machine_that_made_it(made: Made) -> None:
    (export,) = made.recorder.exports.values()
    assert export.kernels and all(facts["file"].startswith("inductor/") for facts in export.kernels.values())
    assert gettempdir() not in export.source and "torch._inductor" not in export.source


def broken(made: Made, **values: Any) -> dict[str, Export]:
    return {name: export._replace(**values) for name, export in made.recorder.exports.items()}


@pytest.mark.parametrize(
    ("fn", "values", "why"),
    [
        (partial(grown, pair(), 3), {}, "none like it"),
        (partial(grown, pair(5), 2), {}, "none like it"),
        (partial(grown, Pair(*(x.double() for x in pair())), 2), {}, "none like it"),
        (partial(grown, pair(at=1), 2), {}, "none like it"),
        (partial(grown, pair(), 2), {"source": "raise RuntimeError('no')"}, "no"),
        (partial(grown, pair(), 2), {"source": "("}, "never closed"),
        (partial(grown, pair(), 2), {"source": ""}, "call"),
        (partial(grown, pair(), 2), {"kernels": {"kernel": {"file": "inductor/xx/gone.so"}}}, "gone.so"),
    ],
)
def test_what_does_not_fit_is_compiled_and_told_of_once(
    made: Made, instead: list[object], caplog: pytest.LogCaptureFixture, fn: Any, values: dict[str, Any], why: str
) -> None:
    ready = Exports(broken(made, **values), made.folder)
    assert ready.graph(fn) is fn and ready.graph(fn) is fn
    assert instead == [fn, fn]
    (warning,) = warnings(caplog)
    assert why in warning


def test_a_shared_object_that_is_damaged_is_told_of(
    made: Made, tmp_path: Path, instead: list[object], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(made.folder, tmp_path / "pack")
    for path in (tmp_path / "pack").rglob("*.so"):
        path.write_bytes(b"object")
    Exports(made.recorder.exports, tmp_path / "pack").graph(fn := partial(grown, pair(), 2))
    assert instead == [fn]
    assert "invalid ELF header" in warnings(caplog)[0] or "too short" in warnings(caplog)[0]


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (grown_by_what_is_hidden, "1 of its inputs"),
        (told, "gives 1 tensors, where 0 are taken"),
        (grown_by_others, "not of dlx"),
    ],
)
def test_what_cannot_be_exported_is_left_out_and_keeps_torchs_artefacts(
    made: Made,
    tmp_path: Path,
    fn: Callable[[Pair], object],
    why: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if fn is grown_by_others:
        monkeypatch.setattr(exports, "OURS", exports.OURS - {"tests"})
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    (tmp_path / "cold").mkdir()
    with caches.empty(tmp_path / "cold"):
        record = Recorder()
        run = record.graph(partial(fn, mine := pair()))
        run()
        run()
        files = caches.collected(tmp_path / "cold")
    assert (record.left_out, record.exports) == (1, {})
    (warning,) = warnings(caplog)
    assert why in warning
    assert mine.x.tolist() == ([0, 0, 0, 0] if fn is told else [2, 4, 6, 8])
    torch._dynamo.reset()
    (tmp_path / "new").mkdir()
    with caches.empty(tmp_path / "new"):
        caches.fill(files, CPU)
        compiled(partial(fn, pair()), numbered=True)()
    assert torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"] == 1


def test_an_export_that_writes_something_else_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def turned(*args: Any) -> Export:
        export = exported(*args)
        return export._replace(inputs=export.inputs[::-1])

    monkeypatch.setattr(recorder, "exported", turned)
    with caches.empty(tmp_path):
        record = Recorder()
        record.graph(partial(grown, Pair(torch.ones(4), torch.arange(4.0)), 2))()
    assert (record.left_out, record.exports) == (1, {})
    assert "writes something else" in warnings(caplog)[0]


def test_views_of_one_memory_that_are_written_are_left_out(made: Made, tmp_path: Path) -> None:
    whole = torch.zeros(6)
    with caches.empty(tmp_path):
        record = Recorder()
        record.graph(partial(grown, Pair(whole[:4], whole[2:]), 2))()
    assert record.left_out == 1


def test_tensors_are_reached_once_and_in_order() -> None:
    x, y = pair()
    norm = RMSNorm(4, 1e-6, CPU, torch.float32)
    inner = partial(grown, Pair(x, y), 2)
    tensors, _ = reached(partial(lambda *_: None, {"b": y, "a": [x, norm]}, inner))
    assert [id(t) for t in tensors] == [id(y), id(x), id(norm.weight)]


def test_what_decides_a_graph_is_told_apart(made: Made) -> None:
    def one(n: int) -> Callable[[], int]:
        return lambda: n

    x, y = pair()
    roots: list[Any] = [
        partial(grown, Pair(x, y), 2), partial(grown, Pair(x, y), 3), partial(told, Pair(x, y)),
        partial(grown, Pair(x, x), 2), partial(grown, [x, y], 2),  # pyright: ignore[reportArgumentType]
        partial(grown, Pair(x, y.double()), 2),
        partial(grown, Pair(x, y[None]), 2), [[x], y], [[x, y]], one(1), one(2), nn.Identity(), nn.Identity().eval(),
    ]  # fmt: skip
    assert len({reached(root)[1] for root in roots} - {""}) == len(roots)
    assert reached(partial(grown, pair(), 2))[1] == reached(partial(grown, pair(), 2))[1]


def launcher(name: str, head: str, static: object) -> FunctionType:
    """As torch makes one: its runner is a global of its own."""
    scope: dict[str, Any] = {"runner": static.run}  # pyright: ignore[reportAttributeAccessIssue]
    exec(f"def launcher({head}, stream):\n    runner(-(n // -4), 1, 1, stream, x, n)", scope)
    scope["launcher"].cache_hash = name.upper()
    return scope["launcher"]


def test_a_cubin_is_launched_as_torch_launches_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    launched: list[Any] = []

    class Static:
        name, shared, num_warps, arg_tys = "triton_poi_0", 96, 4, "Oi"
        arg_names, full_constexprs = ["x", "one", "n", "XBLOCK"], [1, 3]
        has_global_scratch, has_profile_scratch = True, False

        def run(self, *args: object) -> None:
            launched.append(args)

    of_torch = launcher("entry", "x, one, n", static := Static())
    facts = recorder.cubins({"kernel": of_torch}, lambda: of_torch("tensor", 1, 10, stream=7))
    assert launched == [(3, 1, 1, 7, "tensor", 10)]
    assert of_torch.__globals__["runner"] == static.run
    driver = SimpleNamespace(
        _load_kernel=lambda *args: launched.append(args) or ("module", "function", 32, 0),
        _launch_kernel=lambda *args: launched.append(args),
    )
    monkeypatch.setattr(torch._C, "_StaticCudaLauncher", driver, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    kernel: Any = exports.kernel(tmp_path / facts["kernel"]["file"], facts["kernel"])
    kernel.run("other", 1, 10, stream=8)
    assert launched[1] == (str(tmp_path / "triton/ENTRY/triton_poi_0.cubin"), "triton_poi_0", 96, 1)
    assert launched[2] == ("function", 3, 1, 1, 4, 96, "OiO", ("other", 10, None), 8)
    with pytest.raises(ValueError, match="too many values"):
        recorder.cubins({"kernel": of_torch}, lambda: [of_torch("tensor", 1, n, stream=7) for n in (10, 20)])


def test_a_kernel_that_torch_launches_by_triton_is_refused() -> None:
    of_triton: Any = launcher("entry", "x, n", SimpleNamespace(run=print))
    with pytest.raises(RuntimeError, match="does not launch kernel without Triton"):
        recorder.cubins({"kernel": of_triton}, lambda: None)
