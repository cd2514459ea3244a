"""Embed: what does the network see?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Hard:
    """The network sees the tokens themselves."""

    def __call__(self, embed: Callable[[Tensor], Tensor], tok: Tensor) -> Tensor:
        return embed(tok)
