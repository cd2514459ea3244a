"""The sizes of the models that the ops are measured at, as their published configs give them."""

from __future__ import annotations

from typing import NamedTuple


class Experts(NamedTuple):
    """A mixture: X experts of width F, K of them a token; `shared` more, as wide, for every token."""

    X: int
    K: int
    F: int
    shared: int = 0
    dense_layers: int = 0  # the first ones, with a dense MLP
    groups: int = 1  # of which `top_groups` are chosen before the experts
    top_groups: int = 1
    sigmoid: bool = False  # scores by sigmoid plus a bias; softmax otherwise
    scaling: float = 1.0


class Shape(NamedTuple):
    """One model, by the letters of its dims; `block` is the block length that it decodes with."""

    layers: int
    E: int
    F: int  # of a dense MLP
    H: int
    G: int
    V: int
    block: int
    D: int = 128
    rotary: int = 128  # channels of a head that turn
    qk_norm: bool = True
    qkv_bias: bool = False
    experts: Experts | None = None


class Matmul(NamedTuple):
    """One of the matmuls of a layer: weight [N, K], in so many layers."""

    name: str
    N: int
    K: int
    layers: int


SHAPES = {
    "sdar-1.7b": Shape(28, 2048, 6144, 16, 8, 151936, 4),
    "sdar-4b": Shape(36, 2560, 9728, 32, 8, 151936, 4),
    "sdar-8b": Shape(36, 4096, 12288, 32, 8, 151936, 4),
    "llada-8b": Shape(32, 4096, 12288, 32, 32, 126464, 32, qk_norm=False),
    "dream-7b": Shape(28, 3584, 18944, 28, 4, 152064, 32, qk_norm=False, qkv_bias=True),
    "llada2-mini": Shape(
        20, 2048, 5120, 16, 4, 157184, 32, rotary=64,
        experts=Experts(256, 8, 512, shared=1, dense_layers=1, groups=8, top_groups=4, sigmoid=True, scaling=2.5),
    ),
    "sdar-30b-a3b": Shape(48, 2048, 6144, 32, 4, 151936, 4, experts=Experts(128, 8, 768)),
}  # fmt: skip


def matmuls(shape: Shape) -> list[Matmul]:
    """The matmuls of a layer: qkv, out, and gate_up and down of a dense MLP. A shared expert is among the experts."""
    E, F, layers, mix = shape.E, shape.F, shape.layers, shape.experts
    found = [
        Matmul("qkv", (shape.H + 2 * shape.G) * shape.D, E, layers),
        Matmul("out", E, shape.H * shape.D, layers),
    ]
    dense = mix.dense_layers if mix else layers
    if dense:
        found += [Matmul("gate_up", 2 * F, E, dense), Matmul("down", E, F, dense)]
    return found
