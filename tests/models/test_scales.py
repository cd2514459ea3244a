"""Scales of fp8 pages: bounds that hold whatever the tokens, and networks that read what they stored.

The bound is checked against what pages of fp32 hold, and against the input that reaches it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dlx.models import decoder, family
from dlx.models.card import Card
from dlx.models.decoder import Decoder
from dlx.models.gemma.network import DiffusionGemma
from dlx.models.layers import Linear, LowRank, RMSNorm
from dlx.models.scales import scale, scale_
from dlx.ops import OPS
from dlx.ops.attention import View
from dlx.weights import load, read_config
from dlx.weights.fp8 import quantised
from tests import families, gemma

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FAMILIES = ["dream", "stable_diffcoder", "llada", "sdar", "sdar_moe", "llada2", "gemma"]
T, S = 48, 8
CPU = torch.device("cpu")


class Shown(NamedTuple):
    """A network and random ids."""

    card: Card
    net: Decoder | DiffusionGemma
    ids: Tensor

    @torch.no_grad()
    def run(self, dtype: torch.dtype, decoded: bool = False) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Hidden states of all positions, each of which sees those before it, and the pages that they leave."""
        kv = tuple(torch.zeros(2, T // S, S, G, D).to(dtype) for G, D in self.card.kv)
        scale_(self.net, T // S, dtype)
        pos, pages = torch.arange(T, dtype=torch.int32)[None], torch.arange(T // S).int().flip(0)[None]
        encode = torch.tensor([not decoded]) if self.card.gemma else None
        seen = torch.full_like(pos, T) if decoded else pos + 1
        h = self.net(self.net.embed(self.ids[None]), View(pos, pages, seen, encode=encode), kv)
        return h, kv


@pytest.fixture(scope="module", params=FAMILIES)
def shown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    folder, vocab = tmp_path_factory.mktemp("scales") / request.param, families.VOCAB
    if request.param == "gemma":
        gemma.write(folder, gemma.tensors(gemma.model()))
        vocab = gemma.VOCAB
    else:
        families.write(folder, request.param, families.network(request.param))
    card = Card.from_hf(*read_config(folder))
    kind = family(card.arch)
    net = kind.build(card, CPU, torch.float32)
    load(folder, kind.places(card), dict(net.named_parameters()), kind.stacked(card), kind.skipped)
    return Shown(card, net, torch.randint(4, vocab, (T,), generator=torch.Generator().manual_seed(1)).int())


@pytest.fixture(params=["narrow", "wide"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways through the decoder: of few rows, and of many."""
    if request.param == "wide":
        monkeypatch.setattr(decoder, "MOST_ROWS", 0)


def test_no_number_in_a_page_passes_its_heads_bound(shown: Shown) -> None:
    _, kv = shown.run(torch.float32)
    for layer, pages in zip(shown.net.layers, kv, strict=True):
        most = pages.abs().amax((1, 2, 4))
        assert (most > 0).all() and (most <= layer.bounds() * 1.00001).all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_fp8_pages_hold_what_fp32_pages_hold_but_for_rounding(shown: Shown, dtype: torch.dtype) -> None:
    exact, stored = shown.run(torch.float32)[1][0], shown.run(dtype)[1][0]  # of the first layer, whose input is exact
    scales = shown.net.layers[0].attn.scales
    assert scales is not None and (scales == scales[:, :1]).all()
    facts = torch.finfo(dtype)
    value = stored.float() * scales[:, :, None, :, None]
    room = exact.abs() * facts.eps / 2 + facts.tiny * facts.eps / 2 * scales[:, :, None, :, None]
    assert ((value - exact).abs() <= room * 1.001).all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("decoded", [False, True])
def test_a_network_with_fp8_pages_says_what_it_says_with_its_keys_and_values_rounded(
    shown: Shown, dtype: torch.dtype, decoded: bool, path: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    got, exact = shown.run(dtype, decoded)[0], shown.run(torch.float32, decoded)[0]
    store, layers = OPS["kv_store"], iter(shown.net.layers)

    def rounded(*args: Any) -> Tensor:
        q, kv = store(*args), args[5]
        by = scale(next(layers).bounds(), dtype)[:, None, None, :, None]
        kv.copy_((kv / by).to(dtype).float() * by)
        return q

    monkeypatch.setitem(OPS, "kv_store", rounded)
    want = shown.run(torch.float32, decoded)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert (got - exact).abs().max() > 1e-2


@pytest.mark.long
@pytest.mark.parametrize("shown", ["dream", "gemma"], indirect=True)
def test_the_compiled_network_stores_and_says_the_same(shown: Shown) -> None:
    want, stored = shown.run(E5M2, decoded=True)
    compiled = shown._replace(net=torch.compile(shown.net, fullgraph=True, dynamic=False))
    got, written = compiled.run(E5M2, decoded=True)
    for a, b in zip(stored, written, strict=True):
        assert (a.float() != b.float()).float().mean() < 1e-3  # sums in another order may round to the next number
    assert (got - want).norm() < 1e-2 * want.norm()


def test_pages_of_another_dtype_have_no_scales(shown: Shown) -> None:
    shown.run(E4M3)
    shown.run(torch.float32)
    assert all(layer.attn.scales is None for layer in shown.net.layers)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_a_scale_is_the_least_power_of_two_that_brings_a_bound_into_range(dtype: torch.dtype) -> None:
    bounds = torch.tensor([1e-30, 0.3, 1.0, 448.0, 449.0, 57344.0, 1e9])
    scales = scale(bounds, dtype)
    most = torch.finfo(dtype).max
    assert (torch.frexp(scales).mantissa == 0.5).all()
    assert (bounds / scales <= most).all() and (bounds / scales > most / 2).all()


def test_a_head_of_zeros_has_a_scale_that_can_be_divided_by() -> None:
    assert (torch.zeros(2) / scale(torch.zeros(2), E4M3) == 0).all()


def reached(linear: Linear, norm: RMSNorm, direction: Tensor) -> Tensor:
    """|y| [out] of the inputs [out, in] along these directions of x / rms(x)."""
    y = linear(norm(direction), torch.ones(len(direction), 1, dtype=torch.int32)[:, 0])
    return y.diagonal().abs()


def parts() -> tuple[Linear, RMSNorm]:
    rng = torch.Generator().manual_seed(3)
    norm = RMSNorm(32, 0.0, CPU, torch.float32)
    norm.weight.copy_(torch.randn(32, generator=rng))
    linear = Linear(32, 12, CPU, torch.float32, bias=True)
    linear.weight.copy_(torch.randn(12, 32, generator=rng))
    assert linear.bias is not None
    linear.bias.copy_(torch.rand(12, generator=rng))
    return linear, norm


def test_the_input_that_is_made_for_it_reaches_the_bound() -> None:
    linear, norm = parts()
    torch.testing.assert_close(reached(linear, norm, linear.weight * norm.weight), linear.bounds(norm.weight))


def test_the_bound_of_a_matrix_in_fp8_is_that_of_what_it_stands_for() -> None:
    wide, norm = parts()
    linear = Linear(32, 12, CPU, torch.float32, bias=True, fp8=True)
    value, factor = quantised(wide.weight)
    assert linear.scale is not None and linear.bias is not None and wide.bias is not None
    linear.weight.copy_(value)
    linear.scale.copy_(factor)
    linear.bias.copy_(wide.bias)
    direction = value.float() * factor[:, None] * norm.weight
    torch.testing.assert_close(reached(linear, norm, direction), linear.bounds(norm.weight))


def test_the_bound_counts_what_the_largest_adapter_adds() -> None:
    linear, norm = parts()
    alone = linear.bounds(norm.weight)
    rng = torch.Generator().manual_seed(4)
    a, b = torch.randn(2, 32, generator=rng), torch.randn(2, 12, generator=rng)
    linear.adapters = LowRank(a, b, S=2)  # of rank 1 each
    for slot in (1, 2):
        merged = linear.weight + b[slot - 1][:, None] * a[slot - 1]
        x = merged * norm.weight
        y = linear(norm(x), torch.full((12,), slot, dtype=torch.int32)).diagonal().abs()
        assert (y <= linear.bounds(norm.weight) * 1.0001).all()
        assert (y > alone).any()
