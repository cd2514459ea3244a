"""Layers without experts and adapters: functions of tensors, and ops as which the compilers see all of them at once.

    few rows   six ops a layer, between which Inductor has nothing to do: one op runs them all
    many rows  matmuls by cuBLAS, the rest by Inductor: a layer is compiled once a shape, and one op runs it for each

So to the compilers 36 layers are no more than one. Where nothing is compiled nothing of this is an op. The first run of
an op may compile, which the warm-up of a capture does; after that it only launches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from itertools import count
from typing import Any, NamedTuple, Protocol
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from dlx.models.attention import attend
from dlx.models.layers import RMSNorm, linear, normalised
from dlx.ops import OPS
from dlx.ops.attention import View
from dlx.ops.op import LIBRARY


class Dense(NamedTuple):
    """The tensors of a layer; see Attention, MLP and Linear for their shapes. None is not there."""

    attn_gain: Tensor
    qkv: Tensor
    qkv_scale: Tensor | None
    qkv_bias: Tensor | None
    q_gain: Tensor | None
    k_gain: Tensor | None
    kv_scales: Tensor | None
    out: Tensor
    out_scale: Tensor | None
    mlp_gain: Tensor
    gate_up: Tensor
    gate_up_scale: Tensor | None
    down: Tensor
    down_scale: Tensor | None


def narrow(
    layers: Sequence[Dense], h: Tensor, a: Tensor, squares: Tensor, last: Tensor, view: View, frequencies: Tensor,
    kv: Sequence[Tensor], eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Few rows: our matmuls, with norms, residual and SwiGLU fused into them.

    h [T, E]     the stream
    a [T, E]     h · gain of the first norm        squares [T, parts] of h
    last [E]     the gain of the norm that comes after the layers
    → a, squares that this norm takes
    """
    B, C = view.seen.shape
    for w, after, pages in zip(layers, [*(w.attn_gain for w in layers[1:]), last], kv, strict=True):
        qkv = OPS["project"](a, squares, w.qkv, eps, False, w.qkv_scale, w.qkv_bias)
        y = attend(qkv.view(B, C, -1), w.q_gain, w.k_gain, w.kv_scales, view, frequencies, pages, eps)
        h, a, squares = OPS["accumulate"](y.flatten(0, 1), w.out, h, w.mlp_gain, w.out_scale)
        y = OPS["project"](a, squares, w.gate_up, eps, True, w.gate_up_scale)
        h, a, squares = OPS["accumulate"](y, w.down, h, after, w.down_scale)
    return a, squares


def wide(
    w: Dense, x: Tensor, more: Tensor, view: View, frequencies: Tensor, pages: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Many rows, one layer: the stream is x + more [B, C, E] before and after it, so that a sum and the norm that
    follows are one kernel across layers too."""
    x = x + more
    qkv = linear(normalised(x, w.attn_gain, eps), w.qkv, w.qkv_scale, w.qkv_bias)
    y = attend(qkv, w.q_gain, w.k_gain, w.kv_scales, view, frequencies, pages, eps)
    x = x + linear(y, w.out, w.out_scale)
    gate, up = linear(normalised(x, w.mlp_gain, eps), w.gate_up, w.gate_up_scale).chunk(2, -1)
    return x, linear(F.silu(gate) * up, w.down, w.down_scale)


class Stack(Protocol):
    """A network as the ops see it."""

    number: Tensor
    eps: float
    norm: RMSNorm
    frequencies: Tensor
    layer: Callable[..., tuple[Tensor, ...]] | None  # `wide` compiled, where not by `_compiled`

    def dense(self) -> list[Dense]: ...


# Networks by numbers that the ops are told as tensors. With hundreds of weights for arguments each graph takes a second
# more to trace; with plain numbers, which differ from process to process, a graph of one would not serve another.
NETWORKS: WeakValueDictionary[int, Stack] = WeakValueDictionary()
COUNT = count()


def numbered(net: Stack) -> Tensor:
    """The number by which the ops find a network, for as long as it lives; on the host, where they read it.

    It comes last: Inductor takes an op to run where its first argument lies.
    """
    n = next(COUNT)
    NETWORKS[n] = net
    return torch.tensor(n, device="cpu")


def narrow_stack(
    net: Stack, h: Tensor, a: Tensor, squares: Tensor, view: View, kv: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """`narrow` of a network's layers, which the compilers see as one op."""
    if torch.compiler.is_compiling():
        return torch.ops.dlx.narrow_layers(h, a, squares, view.pos, view.pages, view.seen, kv, net.number)
    return narrow(net.dense(), h, a, squares, net.norm.weight, view, net.frequencies, kv, net.eps)


def wide_stack(net: Stack, x: Tensor, view: View, kv: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`wide` of a network's layers but the last, which the compilers see as one op.

    The last one stands before them, so that they leave out what nobody asks for: a prompt's last layer only stores.
    """
    if torch.compiler.is_compiling():
        return torch.ops.dlx.wide_layers(x, view.pos, view.pages, view.seen, kv, net.number)
    return _through(wide, net, x, view, kv)


def _through(
    layer: Callable[..., tuple[Tensor, ...]], net: Stack, x: Tensor, view: View, kv: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    x, more = x.clone(), torch.zeros_like(x)
    for w, pages in zip(net.dense(), kv, strict=False):
        x, more = layer(w, x, more, view, net.frequencies, pages, net.eps)
    return x, more


def _narrow(
    h: Tensor, a: Tensor, squares: Tensor, pos: Tensor, pages: Tensor, seen: Tensor, kv: list[Tensor], number: Tensor
) -> tuple[Tensor, Tensor]:
    net = NETWORKS[int(number)]
    return narrow(net.dense(), h, a, squares, net.norm.weight, View(pos, pages, seen), net.frequencies, kv, net.eps)


def _wide(
    x: Tensor, pos: Tensor, pages: Tensor, seen: Tensor, kv: list[Tensor], number: Tensor
) -> tuple[Tensor, Tensor]:
    net = NETWORKS[int(number)]
    return _through(net.layer or _compiled(), net, x, View(pos, pages, seen), kv)


def _narrow_fake(h: Tensor, a: Tensor, squares: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a), torch.empty_like(squares)


def _wide_fake(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    """One layer through Inductor, once a shape; under the settings of who compiles what it stands in."""
    return torch.compile(wide, fullgraph=True, dynamic=False)


def _define(name: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    run.__annotations__ = inspect.get_annotations(run, eval_str=True)  # a schema wants types, not strings
    LIBRARY.define(name + torch.library.infer_schema(run, mutates_args=("kv",)))
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"dlx::{name}", fake, lib=LIBRARY)


_define("narrow_layers", _narrow, _narrow_fake)
_define("wide_layers", _wide, _wide_fake)
