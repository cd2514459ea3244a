"""Rules of a user's own are tried before anything is decoded: what waits for the device or breaks the graph is refused.

A step is run on fake tensors, which have shapes and no values, with the policy's rules in it; so a rule is called with
what it will be called with, and a line that asks for a value fails. Where steps are compiled, each rule is traced too.
"""

from __future__ import annotations

import copy
import inspect
import linecache
import re
import traceback
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dlx.errors import PolicyError
from dlx.graphs import buffer, canvas, sequence, step
from dlx.graphs.policies import RULES, Policy
from dlx.graphs.step import Ids
from dlx.ops.attention import View

E = 8  # channels of the network that stands in
SHAPES = {"select": "[B, N, L] bool", "rewrite": "[B, N, L] int32", "settle": "[B, N] bool", "embed": "[B, C, E]"}


class Call(NamedTuple):
    """What a rule was called with; Any, as axes differ."""

    axis: str
    rule: Any
    args: tuple[Any, ...]


class Crossed(Exception):
    """A tensor went from the device to the host, or from the host to the device."""


class Border(TorchDispatchMode):
    """Ops take and give tensors of one device; Crossed otherwise. Numbers that wait on the host may be taken."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = ([x for x in tree_leaves(of) if isinstance(x, Tensor)] for of in (args, out))
        before, after = {x.device for x in given}, {x.device for x in made}
        mixed = {x.device for x in given if x.dim() > 0 or x.device.type != "cpu"}
        if len(mixed) > 1 or (before and not after <= before):
            raise Crossed
        return out


class Blank:
    """A network of shapes alone."""

    softcap = 0.0

    def __init__(self, vocab: int, device: torch.device, dtype: torch.dtype) -> None:
        self.like = torch.empty(vocab, E, dtype=dtype, device=device)

    def embed(self, tok: Tensor) -> Tensor:
        return self.like.new_zeros(*tok.shape, E)

    def forward(self, x: Tensor, view: View, kv: tuple[Tensor, ...]) -> Tensor:
        return torch.empty_like(x)

    def head(self) -> Tensor:
        return self.like

    def condition(self, x: Tensor, soft: Tensor) -> Tensor:
        return x + soft

    def expected(self, h: Tensor, temp: Tensor, best: Tensor, p: Tensor, vocab: int) -> Tensor:
        return torch.empty_like(h)


def tried(policy: Policy, ids: Ids, device: torch.device, dtype: torch.dtype, compiled: bool) -> None:
    """Try the rules of a bound policy that are not dlx's own, also through Dynamo if steps are `compiled`.

    Raises PolicyError  with the offending line, for a rule that reads a tensor's values, makes shapes of them, copies
                        between device and host, writes to its arguments, breaks the graph, fails, or returns another
                        shape or dtype than its axis asks
    """
    mine = [axis for axis in RULES if not type(getattr(policy, axis)).__module__.startswith("dlx.")]
    if not mine:
        return
    calls: list[Call] = []
    with FakeTensorMode():
        _step(
            replace(policy, **{axis: _spied(axis, getattr(policy, axis), calls) for axis in mine}), ids, device, dtype
        )
    for call in calls if compiled else ():
        _traced(call)


def _step(policy: Policy, ids: Ids, device: torch.device, dtype: torch.dtype) -> None:
    """A step of two rows of nothing."""
    assert policy.L is not None
    ids = ids._replace(vocab=max(ids.vocab, 8))
    net = Blank(ids.vocab, device, dtype)
    if policy.turn is not None:
        T = 4 * policy.L
        width = policy.L if policy.turn.blocks else T
        buf = buffer.allocate(2, 1, width, 1, 1, device, mem=policy.memory(width))
        memory = sequence.allocate(2, T + policy.L, device)
        for scope, what in enumerate(policy.turn.scopes):
            sequence.denoise(policy, scope, what.width(policy.L) or T, ids, net, buf, memory, ())
        return
    last = E if ids.shift else 0
    buf = buffer.allocate(2, policy.N, policy.L, 1, 1, device, last, dtype, policy.memory())
    if policy.canvas is None:
        step.denoise(policy, ids, net, buf, ())
    else:
        canvas.denoise(policy, ids, net, buf, canvas.allocate(2, policy.L, E, dtype, device), ())


def _spied(axis: str, rule: Any, calls: list[Call]) -> Any:
    """The same rule, of a subclass, so that whatever the step asks of it is answered alike; calls are checked, kept."""

    def call(self: Any, *args: Any) -> Any:
        tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
        before = [t._version for t in tensors]
        try:
            with Border():
                out = rule(*args)
        except Crossed as error:
            why = "it copies between the device and the host, which waits; make tensors on the device, as by arange"
            raise _refused(axis, rule, _line(rule, error), why) from None
        except DataDependentOutputException as error:
            why = "it reads a value on the host, which waits for the device; use torch.where on tensors"
            raise _refused(axis, rule, _line(rule, error), why) from None
        except DynamicOutputShapeException as error:
            why = "the shape of what it makes depends on values; use torch.where, cumsum or gather"
            raise _refused(axis, rule, _line(rule, error), why) from None
        except Exception as error:  # foreign code: whatever it raises is told as its line
            raise _refused(axis, rule, _line(rule, error), f"{type(error).__name__}: {_first(error)}") from None
        if before != [t._version for t in tensors]:
            raise _refused(axis, rule, _place(rule), "it writes to its arguments; make new tensors")
        _check(axis, rule, args, out)
        calls.append(Call(axis, rule, args))
        return out

    twin = copy.copy(rule)
    object.__setattr__(twin, "__class__", type(type(rule).__name__, (type(rule),), {"__slots__": (), "__call__": call}))
    return twin


def _check(axis: str, rule: Any, args: tuple[Any, ...], out: Any) -> None:
    """Raise PolicyError for a result of the wrong shape, dtype or device."""
    if axis not in SHAPES:
        return
    like = args[1]
    shape = (*like.shape, E) if axis == "embed" else like.tok.shape[: 2 if axis == "settle" else 3]
    dtype = {"select": torch.bool, "rewrite": torch.int32, "settle": torch.bool}.get(axis)
    device = (like if axis == "embed" else like.tok).device
    good = isinstance(out, Tensor) and out.shape == shape and dtype in (None, out.dtype) and out.device == device
    if not good:
        what = f"{list(out.shape)} {out.dtype} on {out.device}" if isinstance(out, Tensor) else type(out).__name__
        raise _refused(axis, rule, _place(rule), f"it returns {what}, not {SHAPES[axis]} = {list(shape)} on {device}")


def _traced(call: Call) -> None:
    """Raise PolicyError if Dynamo cannot trace the rule as one graph."""
    import torch._dynamo

    def real(x: Any) -> Any:
        if isinstance(x, Tensor):
            return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        return _embedded if callable(x) else x

    try:
        torch.compile(call.rule.__call__, backend="eager", fullgraph=True, dynamic=False)(*tree_map(real, call.args))
    except Exception as error:  # Dynamo's errors, and foreign code's
        raise _refused(call.axis, call.rule, _line(call.rule, error), f"it breaks the graph: {_first(error)}") from None


def _embedded(tok: Tensor) -> Tensor:
    return torch.zeros(*tok.shape, E, device=tok.device)


def _refused(axis: str, rule: Any, place: str, why: str) -> PolicyError:
    return PolicyError(f"{axis}={rule!r} cannot run on the device: {place}: {why}")


def _line(rule: Any, error: Exception) -> str:
    """Where in the rule's own file an error came from, and what stands there."""
    file = inspect.unwrap(type(rule).__call__).__code__.co_filename
    found = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    named = re.findall(r'File "([^"]+)", line (\d+)', str(error))  # Dynamo tells it in its words
    found += [int(number) for name, number in named if name == file]
    if not found or found[-1] is None:
        return _place(rule)
    said = linecache.getline(file, found[-1]).strip()
    return f"{file}:{found[-1]}" + f": `{said}`" * bool(said)


def _place(rule: Any) -> str:
    code = inspect.unwrap(type(rule).__call__).__code__
    return f"{code.co_filename}:{code.co_firstlineno}"


def _first(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")
