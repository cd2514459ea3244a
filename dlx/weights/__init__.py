"""Checkpoints: folders and repositories, safetensors copied into the parameters of a network, adapters.

Nothing of a checkpoint is executed: pickles are refused, and `auto_map` is not read.
"""

from __future__ import annotations

from dlx.weights.adapter import Adapter, install
from dlx.weights.files import INDEX, SHOWN, SINGLE, Json, Stored, index, inside, read_config, read_json
from dlx.weights.fp8 import FP8
from dlx.weights.hub import fetched
from dlx.weights.parameters import FUSED, LAYOUT, Delta, check, chosen, fill, layout, load, random, rows

__all__ = [
    "FP8",
    "FUSED",
    "INDEX",
    "LAYOUT",
    "SHOWN",
    "SINGLE",
    "Adapter",
    "Delta",
    "Json",
    "Stored",
    "check",
    "chosen",
    "fetched",
    "fill",
    "index",
    "inside",
    "install",
    "layout",
    "load",
    "random",
    "read_config",
    "read_json",
    "rows",
]
