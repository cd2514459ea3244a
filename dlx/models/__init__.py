"""DEVICE: the networks. `MODELS` names the build of each architecture in `families.py`; it is imported when used."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

import torch

from dlx.errors import ModelError
from dlx.models.card import Card, Place
from dlx.models.decoder import Decoder
from dlx.models.families import FAMILIES

if TYPE_CHECKING:
    from dlx.models.gemma.network import DiffusionGemma

LLAMA = "dlx.models.names:LLAMA"

MODELS: dict[str, str] = dict.fromkeys(FAMILIES, LLAMA) | {
    "LLaDAModelLM": "dlx.models.names:LLADA",
    "LLaDA2MoeModelLM": "dlx.models.names:LLADA2",
    "DiffusionGemmaForBlockDiffusion": "dlx.models.gemma.places:GEMMA",
}


class Family(NamedTuple):
    """What tells a family from another: how its network is built, and where its tensors go."""

    build: Callable[[Card, torch.device, torch.dtype], Decoder | DiffusionGemma]
    places: Callable[[Card], dict[str, Place]]
    stacked: Callable[[Card], dict[str, Place]] = lambda _: {}  # tensors that may stand for a parameter's first rows
    skipped: tuple[str, ...] = ()  # how the names of tensors begin that are not loaded


def family(architecture: str) -> Family:
    """The family of a card's `arch`. Raises ModelError if there is none."""
    if architecture not in MODELS:
        raise ModelError(f"architecture {architecture!r} is not supported; dlx loads {', '.join(MODELS)}")
    module, name = MODELS[architecture].split(":")
    return getattr(import_module(module), name)
