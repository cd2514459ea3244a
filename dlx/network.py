"""The network of a worker: checked by its files' headers, built on its device, filled; whole, or not at all."""

from __future__ import annotations

import torch

from dlx import weights
from dlx.config import Config
from dlx.errors import ConfigError, ModelError
from dlx.models import family
from dlx.models.card import Card
from dlx.models.decoder import Decoder
from dlx.models.gemma.network import DiffusionGemma


def load(config: Config, card: Card, raw: weights.Json, device: torch.device) -> Decoder | DiffusionGemma:
    """The network of a checkpoint with its weights and adapters.

    raw  its config.json
    Raises ModelError   weights or an adapter that are not those of the card
           ConfigError  a combination that the family does not have
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
    places = kind.places(card)
    deltas = {} if config.lora is None else weights.Adapter.open(config.lora, places).deltas(places)
    adapters = [weights.Adapter.open(path, places) for path in config.adapters.values()]
    net = kind.build(card, device, config.torch_dtype)
    params = dict(net.named_parameters())
    try:
        if config.load_format == "dummy":
            weights.random(params, config.seed)
        else:
            where, stacked, skipped = weights.layout(raw, places, params), kind.stacked(card), kind.skipped
            weights.load(config.model, where, params, stacked, skipped, deltas=deltas, finite=config.check_weights)
        weights.install(net, adapters, places)
    except BaseException:
        weights.release(params)
        raise
    return net
