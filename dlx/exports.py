"""Graphs as Inductor's generated source and the kernels it calls: run without tracing, without importing Inductor.

An export is looked up by what the compiled function reaches: forms of tensors, numbers, names of code. So it serves any
process in which those, and the pack's key, are the same; it holds no tensor and no path.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from hashlib import sha256
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dlx.graphs.capture import compiled
from dlx.models.dense import wide

log = logging.getLogger(__name__)

Run = Callable[[list[Tensor]], tuple[Tensor, ...]]
ALIGNED = 16  # bytes; what Inductor takes for granted of where some tensors lie
OURS = {"dlx", "torch", "builtins", "functools", "collections"}  # code that a pack's key knows, or torch's version
FAULT = (OSError, ImportError, RuntimeError, AttributeError, NameError, SyntaxError, TypeError, ValueError, LookupError)


class Export(NamedTuple):
    """One graph, in what JSON can hold."""

    source: str  # Python; its function `call` takes a list of tensors
    inputs: list[int]  # which of those that are `reached`
    kernels: dict[str, dict[str, Any]]  # by their names in the source


def reached(root: object) -> tuple[list[Tensor], str]:
    """The tensors that an object leads to, each once and in a fixed order, and a hash of all that decides its graph;
    an empty one where that is other code too, such as rules of a user's own, which may change unseen."""
    tensors: list[Tensor] = []
    facts: list[object] = []
    rooms: set[str] = set()  # that code is in
    seen: dict[int, int] = {}

    def visit(x: object) -> None:
        if x is None or isinstance(x, bool | int | float | str | torch.dtype | torch.device):
            facts.append(repr(x))
        elif (n := len(seen)) != seen.setdefault(id(x), n):
            facts.append(seen[id(x)])
        elif isinstance(x, Tensor):
            tensors.append(x)
            facts.append((str(x.dtype), tuple(x.shape), x.stride(), str(x.device), x.data_ptr() % ALIGNED))
        else:
            named = x if isinstance(x, FunctionType) else type(x)
            rooms.add(named.__module__.split(".")[0])
            facts.append(f"{named.__module__}.{named.__qualname__}")
            parts: Any = vars(x) if isinstance(x, nn.Module) else x
            if isinstance(parts, Mapping):
                parts = [part for item in parts.items() for part in item]
            elif isinstance(x, partial):
                parts = x.func, x.args, x.keywords
            elif isinstance(x, FunctionType):
                parts = [cell.cell_contents for cell in x.__closure__ or ()]
            elif not isinstance(x, list | tuple):
                parts = [getattr(x, field.name) for field in fields(x)] if is_dataclass(x) else ()
            for part in parts:
                visit(part)
            facts.append("end")

    visit(root)
    return tensors, sha256(repr(facts).encode()).hexdigest() if rooms <= OURS else ""


def loaded(export: Export, files: Callable[[str], Path]) -> Run:
    """An export as a function of what is `reached`; `files` says where a file of a pack lies. Raises a FAULT."""
    kernels = {name: kernel(files(facts["file"]), facts) for name, facts in export.kernels.items()}
    scope: dict[str, Any] = {"extern_kernels": torch, **kernels}
    exec(compile(export.source, "<pack>", "exec"), scope)
    call = scope["call"]
    return torch.no_grad()(lambda tensors: call([tensors[i] for i in export.inputs]))


def kernel(path: Path, facts: Mapping[str, Any]) -> object:
    """What the source calls: the function of a shared object, or `run` of a cubin, which has the same grid always."""
    if "way" not in facts:
        # the object asks the environment of C how to read a tensor, as Inductor would have told it
        reader = torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr  # pyright: ignore
        os.putenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR", str(reader))
        spec = spec_from_file_location(f"{path.name.split('.')[0]}.kernel", path)
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.kernel
    static: Any = torch._C._StaticCudaLauncher  # pyright: ignore
    way, args = facts["way"], facts["args"]
    function = static._load_kernel(str(path), facts["name"], way[4], torch.cuda.current_device())[-3]

    def run(*given: object, stream: int) -> None:
        static._launch_kernel(function, *way, tuple(None if i is None else given[i] for i in args), stream)

    return SimpleNamespace(run=run)


class Exports:
    """The exports of a pack in place of a compiler; what they lack is compiled, and told of once."""

    def __init__(self, exports: Mapping[str, Export], pack: Path) -> None:
        self._exports, self._pack = exports, pack
        self._layers: dict[str, Run | None] = {}
        self._wide: Callable[..., tuple[Tensor, ...]] | None = None  # for layers that are not there
        self._level = logging.WARNING

    def graph(self, fn: Callable[[], None]) -> Callable[[], object]:
        """In place of `capture.compiled`."""
        tensors, name = reached(fn)
        run = self._found(name)
        return compiled(fn, numbered=True) if run is None else partial(run, tensors)

    def layer(self, *args: Any) -> tuple[Tensor, ...]:
        """In place of `dense.wide`, compiled."""
        tensors, name = reached(args)
        if name not in self._layers:
            self._layers[name] = self._found(name)
        if run := self._layers[name]:
            return run(tensors)
        self._wide = self._wide or compiled(wide, numbered=True)
        return self._wide(*args)

    def _found(self, name: str) -> Run | None:
        why: object = "the pack has none like it"
        try:
            if export := self._exports.get(name):
                return loaded(export, self._pack.joinpath)
        except FAULT as error:
            why = error
        log.log(self._level, "a graph is traced here, for %s", why)
        self._level = logging.DEBUG
        return None
