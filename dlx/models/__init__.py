"""DEVICE: the networks. `MODELS` names the family of each Hugging Face architecture; a family is imported when used."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import torch

from dlx.errors import ModelError
from dlx.models.card import Card, Place
from dlx.models.decoder import Decoder

MODELS: dict[str, str] = {
    "SDARForCausalLM": "dlx.models.sdar:SDAR",
}


class Family(NamedTuple):
    """What tells a family from another: how its network is built, and where its tensors go."""

    build: Callable[[Card, torch.device, torch.dtype], Decoder]
    places: Callable[[Card], dict[str, Place]]


def family(architecture: str) -> Family:
    """The family of `architectures[0]`. Raises ModelError if there is none."""
    if architecture not in MODELS:
        raise ModelError(f"architecture {architecture!r} is not supported; dlx loads {', '.join(MODELS)}")
    module, name = MODELS[architecture].split(":")
    return getattr(import_module(module), name)
