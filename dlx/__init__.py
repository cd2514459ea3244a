"""dlx, a compiled inference runtime for diffusion language models: public names, imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dlx.async_engine import AsyncEngine
    from dlx.errors import (
        BusyError,
        CapacityError,
        ConfigError,
        DlxError,
        EngineError,
        ModelError,
        PolicyError,
        RequestError,
        ShapeError,
    )
    from dlx.graphs.policies import Policy
    from dlx.llm import LLM
    from dlx.request import Chunk, Output, SamplingParams
    from dlx.session import DecodeSession

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncEngine",
    "BusyError",
    "CapacityError",
    "Chunk",
    "ConfigError",
    "DecodeSession",
    "DlxError",
    "EngineError",
    "ModelError",
    "Output",
    "Policy",
    "PolicyError",
    "RequestError",
    "SamplingParams",
    "ShapeError",
    "__version__",
]

_HOMES = {
    "AsyncEngine": "dlx.async_engine",
    "DecodeSession": "dlx.session",
    "LLM": "dlx.llm",
    "Policy": "dlx.graphs.policies",
    "SamplingParams": "dlx.request",
    "Output": "dlx.request",
    "Chunk": "dlx.request",
}


def __getattr__(name: str) -> object:
    """Import a public name from the module it lives in; torch is imported with the first that needs it."""
    if name not in __all__:
        raise AttributeError(f"module 'dlx' has no attribute {name!r}; its public names are {', '.join(__all__)}")
    value = getattr(import_module(_HOMES.get(name, "dlx.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
