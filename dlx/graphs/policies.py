"""A decoding strategy is a value: rules, the numbers that requests may override, and a few static facts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

from dlx.errors import PolicyError
from dlx.graphs.rules import (
    Canvas,
    Embed,
    EntropyBound,
    Filled,
    Fixed,
    Hard,
    Keep,
    Renoise,
    Rewrite,
    Select,
    Settle,
    Stable,
    Threshold,
)

RULES = ("select", "rewrite", "settle", "embed")
OF_A_CANVAS = (EntropyBound, Renoise, Stable)


@dataclass(frozen=True)
class Policy:
    """How blocks are decoded; printing one prints all of it.

    L         tokens a block; None takes the length that the model was trained for
    N         blocks of a row that may decode at once
    full      what a query at position q sees, where a prompt has P tokens. True: all P for q < P, and every key below
              (q // L + 1) · L from P on. False: the latter for every q. None takes what the model was trained for
    canvas    a block is a canvas of random tokens, not of masks (see graphs/canvas.py); None: masks
    auto_max_nfe        a request without a max_nfe gets one in this forward, from its tokens per forward so far (see
                        stops.py; it can cut answers); None: never
    max_repetition_run  a token that stands so often in a row ends the answer; requests may override it; None: no guard
    accept, open_at, force_at  defaults of the columns a request may override (see SamplingParams)
    """

    L: int | None = None
    N: int = 1
    full: bool | None = None
    select: Select = Threshold()
    rewrite: Rewrite = Keep()
    settle: Settle = Filled()
    embed: Embed = Hard()
    canvas: Canvas | None = None
    accept: float = 0.9
    open_at: float = 0.1
    force_at: float = 0.9
    auto_max_nfe: int | None = None
    max_repetition_run: int | None = None

    def __post_init__(self) -> None:
        if self.L is not None and not (_integer(self.L) and 1 <= self.L <= 256):
            raise PolicyError(f"L={self.L!r} tokens a block is not allowed; use 1 to 256, or None for the model's own")
        if not (_integer(self.N) and 1 <= self.N <= 32):
            raise PolicyError(f"N={self.N!r} decoding blocks are not allowed; use 1 to 32")
        if self.full not in (None, True, False):
            raise PolicyError(f"full={self.full!r} is not allowed; use True, False, or None for the model's own")
        if self.canvas is not None and not (
            self.N == 1 and _integer(self.canvas.steps) and self.canvas.steps > 0 < self.canvas.cold <= self.canvas.hot
        ):
            raise PolicyError(f"N={self.N} blocks with {self.canvas} are not allowed; use N=1, a step, 0 < cold <= hot")
        for name in ("accept", "open_at", "force_at"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
                raise PolicyError(f"{name}={value!r} is not allowed; use a number from 0 to 1")
        for name, least in (("auto_max_nfe", 1), ("max_repetition_run", 2)):
            value = getattr(self, name)
            if value is not None and not (_integer(value) and least <= value <= 65_536):
                raise PolicyError(f"{name}={value!r} is not allowed; use {least} to 65536, or None")
        if self.canvas is not None and self.auto_max_nfe is not None:
            raise PolicyError(
                f"auto_max_nfe={self.auto_max_nfe} does not suit a canvas, of which nothing stays; use None"
            )
        for name in RULES:
            rule = getattr(self, name)
            if not callable(rule) or isinstance(rule, type) or not (is_dataclass(rule) and _frozen(rule)):
                raise PolicyError(
                    f"{name}={rule!r} is not a rule; pass a frozen dataclass with __call__, as in graphs/rules"
                )
            if isinstance(rule, OF_A_CANVAS) and self.canvas is None:
                raise PolicyError(f"{name}={rule!r} is a rule of canvases; pass canvas=Canvas(), or another rule")

    @property
    def keeps(self) -> bool:
        """Decided tokens stay, so that what is before the first mask is final."""
        return isinstance(self.rewrite, Keep)

    def describe(self) -> dict[str, Any]:
        """The whole value as JSON-able data: rules as {"rule": name, field: value}."""
        out: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            out[f.name] = {"rule": type(value).__name__, **asdict(value)} if f.name in RULES else value
        out["canvas"] = None if self.canvas is None else asdict(self.canvas)
        return out


def _frozen(rule: Any) -> bool:
    return type(rule).__dataclass_params__.frozen


def _integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


POLICIES: dict[str, Policy] = {
    "single_bd": Policy(),
    "multi_bd": Policy(N=4),
    "fixed": Policy(select=Fixed(1)),
    # D2F (discrete diffusion forcing): for networks trained all-to-all, by themselves or with its adapters
    "d2f": Policy(N=4, full=True),
    "diffusion_gemma": Policy(select=EntropyBound(), rewrite=Renoise(), settle=Stable(), canvas=Canvas(), accept=0.1),
}


def named(policy: str | Policy) -> Policy:
    """The policy of that name; a Policy passes through. Raises PolicyError for an unknown name."""
    if isinstance(policy, Policy):
        return policy
    if not isinstance(policy, str) or policy not in POLICIES:
        raise PolicyError(f"policy {policy!r} is unknown; use one of {', '.join(POLICIES)}, or pass a Policy")
    return POLICIES[policy]
