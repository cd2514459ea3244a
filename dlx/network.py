"""The network of a worker: checked by its files' headers, built on its device, filled; whole, or not at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from dlx import memory, weights
from dlx.config import Config
from dlx.errors import CapacityError, ConfigError, ModelError
from dlx.models import family
from dlx.models.card import Card, Place
from dlx.models.decoder import Decoder
from dlx.models.gemma.network import DiffusionGemma

ABSURD = 8  # a config.json that describes so many times what its files hold is not compared tensor by tensor
META = torch.device("meta")


class Outline(NamedTuple):
    """A checkpoint that its files' headers say can be loaded, and its network without memory."""

    net: Decoder | DiffusionGemma
    places: Mapping[str, Place]  # of the tensors that are there
    stored: Mapping[str, weights.Stored]


def outline(model: Path, card: Card, raw: weights.Json, dtype: torch.dtype) -> Outline:
    """Compare a checkpoint's headers with its config.json; nothing is allocated. Raises ModelError."""
    stored = weights.index(model)
    there, described = sum(math.prod(each.shape) for each in stored.values()), numbers(card)
    if described > ABSURD * there:
        raise ModelError(
            f"config.json of {model} describes a network of at least {described} numbers, and its weights hold "
            f"{there}; check that config.json and weights are of the same checkpoint"
        )
    kind = family(card.arch)
    net = kind.build(card, META, dtype)
    params = dict(net.named_parameters())
    places = weights.chosen(weights.layout(raw, kind.places(card), params), kind.stacked(card), stored)
    weights.check(model, stored, places, params, kind.skipped)
    return Outline(net, places, stored)


def load(config: Config, card: Card, raw: weights.Json, device: torch.device) -> Decoder | DiffusionGemma:
    """The network of a checkpoint with its weights and adapters.

    raw  its config.json
    Raises ModelError     weights or an adapter that are not those of the card
           ConfigError    a combination that the family does not have
           CapacityError  no memory for it
    """
    kind = family(card.arch)
    if config.lora is not None and raw.get("quantization_config") is not None:
        raise ModelError(f"{config.model} is in fp8 already: merge lora={str(config.lora)!r} into what it was made of")
    if config.quantization is not None and card.gemma is not None:
        raise ConfigError(f"quantization={config.quantization!r} is not there for {card.family}; leave it out")
    if config.adapters and card.gemma is not None:
        raise ConfigError(
            f"adapters={list(config.adapters)} cannot be kept apart in {card.family}; merge one: lora=FOLDER"
        )
    if config.load_format == "dummy":
        least, total = numbers(card) * (1 if card.fp8 else config.torch_dtype.itemsize), memory.room(device).total
        if least > total:
            raise CapacityError(
                f"random weights of {config.model} take {memory.gib(least)} or more, and {device} has "
                f"{memory.gib(total)}; use a smaller shape"
            )
        known = Outline(kind.build(card, META, config.torch_dtype), {}, {})
    else:
        known = outline(config.model, card, raw, config.torch_dtype)
    names = kind.places(card)
    deltas = {} if config.lora is None else weights.Adapter.open(config.lora, names).deltas(names, config.check_weights)
    adapters = [weights.Adapter.open(path, names) for path in config.adapters.values()]
    need = sum(param.nbytes for param in known.net.parameters())
    advice = "use quantization='fp8' or a smaller model, or end what else uses the memory"
    with memory.enough(f"the weights of {config.model} do not fit into memory", need, device, advice):
        net = kind.build(card, device, config.torch_dtype)
        params = dict(net.named_parameters())
        try:
            if config.load_format == "dummy":
                weights.random(params, config.seed)
            else:
                weights.fill(known.stored, known.places, params, deltas=deltas, finite=config.check_weights)
            weights.install(net, adapters, names, config.check_weights)
        except BaseException:
            memory.release(params.values())
            raise
    return net


def numbers(card: Card) -> int:
    """Numbers that the matrices of a network have at least, without building it or walking its layers."""
    mixed = card.mixture
    D = card.head_dim if card.gemma is None else min(card.head_dim, card.gemma.global_dim)
    layer = 2 * card.heads * D
    experts = 0 if mixed is None else max(card.layers - mixed.dense, 0) * 3 * mixed.experts * mixed.ffn
    dense = 3 * card.ffn * (card.layers if mixed is None else min(mixed.dense, card.layers))
    return card.hidden * (card.vocab + card.layers * layer + experts + dense)
