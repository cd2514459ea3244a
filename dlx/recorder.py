"""Compiles as ever and keeps each graph as an Export, tried at once; what cannot be one is left out."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import Tensor

from dlx.exports import FAULT, Export, loaded, reached
from dlx.graphs.capture import compiled
from dlx.models.dense import wide

log = logging.getLogger(__name__)

COMPARED = 1 << 26  # bytes of a tensor up to which what is written to it is compared: less than K/V pages
MADE = re.compile(r"^(\w+) = async_compile\.", re.MULTILINE)
# of a source: what makes its kernels; imports and comments; what measures it
NEEDLESS = (
    re.compile(r"^\w+ = async_compile\..*?^'''.*?\n", re.MULTILINE | re.DOTALL),
    re.compile(r"^(?:from torch\._inductor|import triton|(?:del )?async_compile\b| *#).*\n", re.MULTILINE),
    re.compile(r"^def (?:get_args|benchmark_compiled_module)\(.*", re.MULTILINE | re.DOTALL),
)


class Recorder:
    """In place of a compiler while a pack is made."""

    def __init__(self) -> None:
        self.exports: dict[str, Export] = {}
        self.left_out = 0  # graphs
        self._met: set[str] = set()  # digests: what is left out runs again, when `_first` ends with another's
        self._first: list[tuple[Any, list[Tensor]]] = []  # torch's CompiledFxGraphs and the inputs of their first runs
        self._wide = self.graph(wide)
        torch._dynamo.reset()  # what this process has compiled before it would not compile again

    def graph(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """In place of `capture.compiled`, also of a function of arguments."""
        ready = compiled(fn, numbered=True, backend=self._backend)

        def run(*args: Any) -> Any:
            results = ready(*args)
            self._keep(args or fn, len(results) if args else 0)
            return results

        return run

    def layer(self, *args: Any) -> tuple[Tensor, ...]:
        """In place of `dense.wide`, compiled; a method like that of Exports, for `reached` finds it in the network."""
        return self._wide(*args)

    def _backend(self, gm: torch.fx.GraphModule, examples: Sequence[Any]) -> Any:
        """Inductor, and the first run of each graph is noted."""
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        def inner(gm: torch.fx.GraphModule, examples: Sequence[Any], **settings: Any) -> Any:
            graph: Any = compile_fx_inner(gm, examples, **settings)
            run = graph.current_callable

            def first(inputs: list[Tensor]) -> tuple[Tensor, ...]:
                self._first.append((graph, list(inputs)))  # which the graph empties
                graph.current_callable = run
                return run(inputs)

            graph.current_callable = first
            return graph

        return compile_fx(gm, examples, inner_compile=inner)

    def _keep(self, root: object, results: int) -> None:
        """Export what was compiled just now, unless it is known, and see that it gives and writes the same."""
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        tensors, name = reached(root)
        if name in self._met:
            return
        self._met.add(name)
        try:
            graph, inputs = self._first.pop()
            if not name:
                raise RuntimeError("it has code that is not of dlx, and may change unseen")
            export = exported(graph, inputs, tensors)
            run = loaded(export, lambda file: Path(cache_dir(), file.removeprefix("inductor/")))
            written = [inputs[i] for i in graph.mutated_input_idxs if inputs[i].nbytes <= COMPARED]
            before = [x.clone() for x in written]
            want = outcome(lambda: graph.current_callable(list(inputs)), written, before)
            if len(want) - len(written) != results:  # of which Dynamo makes something: its code is no part of the graph
                raise RuntimeError(f"it gives {len(want) - len(written)} tensors, where {results} are taken")
            if not all(map(same, outcome(lambda: run(tensors), written, before), want)):
                raise RuntimeError("it gives or writes something else")
            self.exports[name] = export
        except FAULT as error:
            log.warning("a graph is left out of the exports, for %s: %s", type(error).__name__, error)
            self.left_out += 1


def outcome(run: Callable[[], tuple[Tensor, ...]], written: Sequence[Tensor], before: Sequence[Tensor]) -> list[Tensor]:
    """What a run gives and what is written then, where it was as `before`."""
    for x, kept in zip(written, before, strict=True):
        x.copy_(kept)
    return [*run(), *(x.clone() for x in written)]


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.double(), b.double(), 0, 0, equal_nan=True)


def exported(graph: Any, inputs: list[Tensor], tensors: list[Tensor]) -> Export:
    """A graph, without what it does not need to run. Raises a FAULT if it needs more than an Export has."""
    at = {id(x): i for i, x in enumerate(tensors)}
    lost = sum(id(x) not in at for x in inputs)
    if lost or graph.constants:
        raise RuntimeError(f"{lost} of its inputs are out of reach, and {[*graph.constants]} are constants")
    scope, source = graph.compiled_fn_runner.call.__globals__, graph.source_code
    made = {name: scope[name] for name in MADE.findall(source)}
    for each in NEEDLESS:
        source = each.sub("", source)
    objects: dict[str, Any] = {name: x.__self__ for name, x in made.items() if isinstance(x, BuiltinFunctionType)}
    launchers = {name: x.launchers[0] for name, x in made.items() if name not in objects}
    kernels = {name: {"file": "/".join(("inductor", *Path(x.__file__).parts[-2:]))} for name, x in objects.items()}
    kernels |= cubins(launchers, lambda: graph.current_callable(list(inputs))) if launchers else {}
    return Export(source, [at[id(x)] for x in inputs], kernels)


def cubins(launchers: Mapping[str, Any], run: Callable[[], object]) -> dict[str, dict[str, Any]]:
    """Triton kernels that torch launches without Triton, with their grids in `run`. Raises as `exported`."""
    seen: dict[str, set[tuple[int, ...]]] = {name: set() for name in launchers}
    runners = {name: launcher.__globals__["runner"] for name, launcher in launchers.items()}
    if others := [name for name, runner in runners.items() if not inspect.ismethod(runner)]:
        raise RuntimeError(f"torch does not launch {', '.join(others)} without Triton")
    for name, launcher in launchers.items():
        launcher.__globals__["runner"] = lambda *args, name=name: (
            seen[name].add((*args[:3], len(args) - 4)), runners[name](*args)
        )  # fmt: skip
    run()
    kernels: dict[str, dict[str, Any]] = {}
    for name, launcher in launchers.items():
        launcher.__globals__["runner"], static = runners[name], runners[name].__self__
        ((*grid, count),) = seen[name]
        given = [*inspect.signature(launcher).parameters]
        taken = [n for i, n in enumerate(static.arg_names) if i not in static.full_constexprs and n in given]
        if not count == len(taken) == len(static.arg_tys):
            raise RuntimeError(f"{name} is launched with {count} arguments, and takes {taken}")
        empty = static.has_global_scratch + static.has_profile_scratch  # pointers to no bytes
        kernels[name] = {
            "file": f"triton/{launcher.cache_hash}/{static.name}.cubin",
            "name": static.name,
            "way": [*grid, static.num_warps, static.shared, static.arg_tys + "O" * empty],
            "args": [given.index(n) for n in taken] + [None] * empty,
        }
    return kernels
