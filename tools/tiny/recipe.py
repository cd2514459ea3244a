"""How the network is trained: every number of it, checked once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dlx.errors import ConfigError
from dlx.tasks import MIX
from tools.tiny.network import PRESETS


@dataclass(frozen=True)
class Recipe:
    """The bundled model's recipe.

    preset       name of the network's dimensions
    mix          each task's share of the documents
    minutes      of training steps, the first of each call (compilation) not counted
    rows, row_tokens  size of a batch; the network sees each row twice, noisy and clean
    lr, decay    peak learning rate; weight decay of the matrices
    weight_power a token's loss weighs (response tokens ÷ masked tokens of its block) to this power
    blocks       each block length's share of the batches; the first is the model's own
    group_blocks, group_share  most blocks that are noisy together; share of documents with such groups
    own_from, own_share        share of the time after which on-policy passes come, and of the steps with one
    own_clean    most of a row's guesses that such a pass replaces with the clean token; see objective.own_guesses
    """

    preset: str = "m"
    mix: Mapping[str, float] = field(default_factory=lambda: dict(MIX))
    minutes: float = 7.0
    rows: int = 128
    row_tokens: int = 512
    lr: float = 3e-3
    decay: float = 0.05
    weight_power: float = 0.5
    blocks: Mapping[int, float] = field(default_factory=lambda: {16: 0.6, 32: 0.4})
    group_blocks: int = 4
    group_share: float = 0.4
    own_from: float = 0.6
    own_share: float = 0.5
    own_clean: float = 0.0
    seed: int = 0

    def check(self) -> None:
        """Raise ConfigError for the first value that cannot work."""
        if self.preset not in PRESETS:
            raise ConfigError(f"preset={self.preset!r} is unknown; use one of {', '.join(PRESETS)}")
        if not self.mix:
            raise ConfigError("mix is empty; name at least one task that is installed")
        for name in ("minutes", "rows", "row_tokens", "lr", "group_blocks"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)} is not allowed; use a number above 0")
        for name in ("own_from", "own_share", "own_clean"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} is not allowed; use a number from 0 to 1")
        uneven = [L for L in self.blocks if self.row_tokens % L]
        if uneven:
            raise ConfigError(
                f"row_tokens={self.row_tokens} is no multiple of the block lengths {uneven}; use one that is"
            )

    def rate(self, step: int, share: float) -> float:
        """Learning rate after so many steps and this share of the time: a rise, a plateau, a linear fall."""
        rise = max((step + 1) / 200, share / 0.04)
        fall = max(0.0, (1 - share) / 0.5)
        return self.lr * max(min(1.0, rise) * min(1.0, fall), 1e-3)
