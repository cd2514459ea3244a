"""The published configs give networks of the true shapes: every tensor of a checkpoint has its place, none is left."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from dlx.models import family
from dlx.models.card import Card

DATA = Path(__file__).parents[1] / "data"
TOTALS = {
    "diffucoder_7b": 7_615_616_512,
    "dream_7b": 7_615_616_512,
    "dream_reasoner_8b": 8_190_735_360,
    "fast_dllm_v2_1_5b": 1_543_714_304,
    "fast_dllm_v2_7b": 7_615_616_512,
    "llada2_1_mini": 16_255_638_528,
    "llada2_flash": 102_889_697_280,
    "llada2_mini": 16_255_638_528,
    "llada_1_5_8b": 8_015_581_184,
    "llada_8b": 8_015_581_184,
    "llada_moe_7b_a1b": 7_356_880_896,
    "sdar_1_7b": 2_031_739_904,
    "sdar_30b_a3b": 30_532_122_624,
    "sdar_4b": 4_411_424_256,
    "sdar_8b": 8_190_735_360,
    "stable_diffcoder_8b": 8_250_462_208,
}  # the experts' biases, which the publishers count as buffers, left out


@pytest.mark.parametrize("name", TOTALS)
def test_a_published_config_has_a_place_for_every_tensor_of_its_checkpoint(name: str) -> None:
    card = Card.from_hf(json.loads((DATA / "configs" / f"{name}.json").read_text()), {})
    kind = family(card.arch)
    places = kind.places(card)
    found = Counter((re.sub(r"\b(layers|blocks|experts)\.\d+", r"\1.N", n), p.shape) for n, p in places.items())
    listed = json.loads((DATA / "tensors" / f"{name}.json").read_text())
    assert found == {(one["name"], tuple(one["shape"])): one["count"] for one in listed}

    params = dict(kind.build(card, torch.device("meta"), torch.bfloat16).named_parameters())
    filled: dict[str, list[tuple[int, int]]] = {}
    for place in places.values():
        filled.setdefault(place.param, []).append((place.row, place.rows))
    assert filled.keys() == params.keys()
    for param, parts in filled.items():
        end = 0
        for row, rows in sorted(parts):
            assert row == end, param
            end += rows
        assert end == params[param].numel() // (params[param].shape[-1] if params[param].ndim > 1 else 1), param
    for place in kind.stacked(card).values():
        alone = params[place.param].shape[0] - (card.mixture is not None and card.mixture.joined)
        assert (alone, *params[place.param].shape[1:]) == place.shape
    biases = (card.layers - card.mixture.dense) * card.mixture.experts if card.mixture and card.mixture.bias else 0
    assert sum(p.numel() for p in params.values()) - biases == TOTALS[name]


def test_the_router_and_its_bias_are_fp32_whatever_the_rest_is() -> None:
    card = Card.from_hf(json.loads((DATA / "configs" / "llada2_mini.json").read_text()), {})
    params = dict(family(card.arch).build(card, torch.device("meta"), torch.bfloat16).named_parameters())
    wide = {name.split(".")[-1] for name, p in params.items() if p.dtype == torch.float32}
    assert wide == {"router", "bias"}
    assert params["layers.1.mlp.gate_up"].shape == (257, 1024, 2048)  # the shared one is the last
