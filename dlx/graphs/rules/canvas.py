"""The schedule of a canvas."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Canvas:
    """How a canvas is denoised: `steps` forwards at most, at temperatures that fall from `hot` towards `cold`.

    Forward n of a canvas, counted from 0, has cold + (hot − cold) · (steps − n) / steps. Source transformers'
    LinearTemperatureScheduleLogitsProcessor
    """

    steps: int = 48
    hot: float = 0.8
    cold: float = 0.4

    def heat(self, turn: Tensor) -> Tensor:
        """[B] int32 forwards spent on the canvas → [B] f32 temperature of the next."""
        return self.cold + (self.hot - self.cold) * ((self.steps - turn).float() / self.steps)
