"""A decoding strategy is a value: rules, the numbers that requests may override, and a few static facts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

from dlx.errors import PolicyError
from dlx.graphs.rules import (
    Annealed,
    Canvas,
    Embed,
    EntropyBound,
    Even,
    Filled,
    Fixed,
    Hard,
    Keep,
    Refresh,
    Renoise,
    Rewrite,
    Select,
    Settle,
    Stable,
    SubBlock,
    Threshold,
    Turn,
    Whole,
    Within,
)

RULES = ("select", "rewrite", "settle", "embed")
OF_A_CANVAS = (EntropyBound, Renoise, Stable)
OF_A_TURN = (Annealed, Even)


@dataclass(frozen=True)
class Policy:
    """How blocks are decoded; printing one prints all of it.

    L         tokens a block; None takes the length that the model was trained for
    N         blocks of a row that may decode at once
    full      what a query at position q sees, where a prompt has P tokens. True: all P for q < P, and every key below
              (q // L + 1) · L from P on. False: the latter for every q. None takes what the model was trained for
    canvas    a block is a canvas of random tokens, not of masks (see graphs/canvas.py); None: masks
    turn      which part of a sequence a forward computes (see graphs/sequence.py); None: the window
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
    turn: Turn | None = None
    accept: float = 0.9
    open_at: float = 0.1
    force_at: float = 0.9

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
        turn = self.turn
        if turn is not None and not (
            isinstance(turn, Turn) and self.N == 1 and self.canvas is None and self.full in (None, turn.full)
        ):
            raise PolicyError(
                f"turn={turn!r} with N={self.N}, full={self.full} and canvas={self.canvas} is not allowed; "
                "use a rule of rules/turn.py, with N=1, its own visibility and no canvas"
            )
        for name in ("accept", "open_at", "force_at"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
                raise PolicyError(f"{name}={value!r} is not allowed; use a number from 0 to 1")
        for name in RULES:
            rule = getattr(self, name)
            if not callable(rule) or not is_dataclass(rule):
                raise PolicyError(
                    f"{name}={rule!r} is not a rule; pass a frozen dataclass with __call__, as in graphs/rules"
                )
            if isinstance(rule, OF_A_CANVAS) and self.canvas is None:
                raise PolicyError(f"{name}={rule!r} is a rule of canvases; pass canvas=Canvas(), or another rule")
            if isinstance(rule, OF_A_TURN) and turn is None:
                raise PolicyError(f"{name}={rule!r} is a rule of whole sequences; pass turn=Whole(), or another rule")

    def describe(self) -> dict[str, Any]:
        """The whole value as JSON-able data: rules as {"rule": name, field: value}."""
        out: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            ruled = f.name in RULES or (f.name == "turn" and value is not None)
            out[f.name] = {"rule": type(value).__name__, **asdict(value)} if ruled else value
        out["canvas"] = None if self.canvas is None else asdict(self.canvas)
        return out


def _integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


POLICIES: dict[str, Policy] = {
    "single_bd": Policy(),
    "multi_bd": Policy(N=4),
    "fixed": Policy(select=Fixed(1)),
    # D2F (discrete diffusion forcing): for networks trained all-to-all, by themselves or with its adapters
    "d2f": Policy(N=4, full=True),
    "diffusion_gemma": Policy(select=EntropyBound(), rewrite=Renoise(), settle=Stable(), canvas=Canvas(), accept=0.1),
    # for networks trained all-to-all: the answer decides against K/V that a forward over all of it stored
    "fast_dllm_v1": Policy(full=True, turn=Refresh()),
    "fast_dllm_v1_prefix": Policy(full=True, turn=Refresh(prefix=True)),
    "vicinity": Policy(full=True, turn=Refresh(left=16, right=16, warm_up=4)),
    # what LLaDA's own sampler does, and Dream's: all of the sequence in every forward
    "low_confidence": Policy(full=True, turn=Whole(), select=Even()),
    "random": Policy(full=True, turn=Whole(), select=Even(random=True)),
    "origin": Policy(full=True, turn=Whole(blocks=False), select=Annealed(random=True)),
    "maskgit_plus": Policy(full=True, turn=Whole(blocks=False), select=Annealed()),
    "fast_dllm_v2": Policy(full=False, select=Within(8)),
    "fast_dllm_v2_cached": Policy(full=False, select=Within(8), turn=SubBlock(8)),
}


def named(policy: str | Policy) -> Policy:
    """The policy of that name; a Policy passes through. Raises PolicyError for an unknown name."""
    if isinstance(policy, Policy):
        return policy
    if not isinstance(policy, str) or policy not in POLICIES:
        raise PolicyError(f"policy {policy!r} is unknown; use one of {', '.join(POLICIES)}, or pass a Policy")
    return POLICIES[policy]
