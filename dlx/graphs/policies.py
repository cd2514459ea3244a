"""A decoding strategy is a value: rules, the numbers that requests may override, and a few static facts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import reduce
from typing import Any, Literal, get_args

import torch

from dlx.errors import PolicyError
from dlx.graphs.rules import (
    Annealed,
    Asking,
    Asks,
    Calm,
    Canvas,
    Credit,
    Edit,
    Embed,
    EntropyBound,
    EntropyFirst,
    Even,
    Filled,
    Fixed,
    Hard,
    Hierarchical,
    Keep,
    Keeping,
    Leading,
    Merge,
    Plain,
    Quota,
    Refresh,
    Renoise,
    Rewrite,
    Score,
    Select,
    Settle,
    Smooth,
    Stable,
    SubBlock,
    Threshold,
    Turn,
    Whole,
    Within,
)
from dlx.graphs.rules.shown import columns

RULES = ("score", "select", "rewrite", "settle", "embed")
NUMBERS = ("accept", "open_at", "force_at", "edit", "remask", "stability")  # fields that are defaults of columns
Confidence = Literal["prob", "margin", "entropy"]
CONFIDENCES = {"prob": Asks(), "margin": Asks(margin=True), "entropy": Asks(entropy=True)}
assert set(CONFIDENCES) == set(get_args(Confidence))
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
    confidence  what ranks positions: prob of the candidate, margin over the next id, or entropy (the least first);
              `accept` is held against the probability all the same
    filters   requests may ask for top_k and top_p; such a step is slower; Config.filters sets it too
    auto_max_nfe        a request without a max_nfe gets one in this forward, from its tokens per forward so far (see
                        stops.py; it can cut answers); None: never
    max_repetition_run  a token that stands so often in a row ends the answer; requests may override it; None: no guard
    watch     the window keeps proposals and confidences for whoever watches; Config.watch sets it
    accept, open_at, force_at, edit, remask, stability  defaults of the columns a request may override (SamplingParams)
    asks, keepers, seen  what its rules ask for; those that keep a memory; the names of it that `embed` sees
    """

    L: int | None = None
    N: int = 1
    full: bool | None = None
    score: Score = Plain()
    select: Select = Threshold()
    rewrite: Rewrite = Keep()
    settle: Settle = Filled()
    embed: Embed = Hard()
    canvas: Canvas | None = None
    turn: Turn | None = None
    accept: float = 0.9
    open_at: float = 0.1
    force_at: float = 0.9
    edit: float = 0.9
    remask: float = 0.0
    stability: float = 0.0
    confidence: Confidence = "prob"
    filters: bool = False
    auto_max_nfe: int | None = None
    max_repetition_run: int | None = None
    watch: bool = False
    asks: Asks = field(init=False, repr=False, compare=False)
    keepers: tuple[Keeping, ...] = field(init=False, repr=False, compare=False)
    seen: tuple[str, ...] = field(init=False, repr=False, compare=False)

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
        for name in NUMBERS:
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
        if self.confidence not in CONFIDENCES or not isinstance(self.filters, bool):
            raise PolicyError(
                f"confidence={self.confidence!r} with filters={self.filters!r} is not allowed; "
                f"use one of {', '.join(CONFIDENCES)}, and True or False"
            )
        if not isinstance(self.watch, bool):
            raise PolicyError(f"watch={self.watch!r} is not a bool; pass True or False")
        for name in RULES:
            rule = getattr(self, name)
            if not callable(rule) or isinstance(rule, type) or not (is_dataclass(rule) and _frozen(rule)):
                raise PolicyError(
                    f"{name}={rule!r} is not a rule; pass a frozen dataclass with __call__, as in graphs/rules"
                )
            if isinstance(rule, OF_A_CANVAS) and self.canvas is None:
                raise PolicyError(f"{name}={rule!r} is a rule of canvases; pass canvas=Canvas(), or another rule")
            if isinstance(rule, OF_A_TURN) and turn is None:
                raise PolicyError(f"{name}={rule!r} is a rule of whole sequences; pass turn=Whole(), or another rule")
        rules = [getattr(self, name) for name in RULES]
        asked = [rule.asks for rule in rules if isinstance(rule, Asking)]
        keepers = tuple(rule for rule in rules if isinstance(rule, Keeping))
        seen = tuple(self.embed.memory(1)) if isinstance(self.embed, Keeping) else ()
        derived = {"asks": reduce(Asks.also, asked, CONFIDENCES[self.confidence]), "keepers": keepers, "seen": seen}
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        if turn is not None and not turn.blocks and keepers:
            raise PolicyError(
                f"{turn} has no blocks to keep a memory of; use Whole(blocks=True), or rules that need none"
            )
        if self.canvas is not None and (keepers or self.asks != Asks() or self.filters):
            raise PolicyError(f"{self.canvas} keeps no memory and has no filters; use rules that need none")

    def memory(self, width: int | None = None) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """What is kept of a block: name → shape behind [B, N+1], dtype. For a policy with its block length.

        width  positions of a place, where that is not a block; rules keep nothing then
        """
        assert self.L is not None, "bind() gives a policy its block length"
        kept = {name: each for rule in self.keepers for name, each in rule.memory(self.L).items()}
        return kept | (columns(width or self.L) if self.watch else {})

    @property
    def keeps(self) -> bool:
        """Decided tokens stay, so that what is before the first mask is final."""
        return isinstance(self.rewrite, Keep)

    @property
    def step(self) -> int:
        """Tokens of a prompt's block, of a policy with its block length: 1, which is causal, where a window begins at
        any position."""
        assert self.L is not None, "bind() gives a policy its block length"
        return 1 if self.canvas is not None or (self.turn is not None and self.turn.full) else self.L

    def describe(self) -> dict[str, Any]:
        """The whole value as JSON-able data: rules as {"rule": name, field: value}."""
        out: dict[str, Any] = {}
        for f in (f for f in fields(self) if f.init):
            value = getattr(self, f.name)
            ruled = f.name in (*RULES, "turn") and value is not None
            out[f.name] = {"rule": type(value).__name__, **_own(value)} if ruled else value
        out["canvas"] = None if self.canvas is None else asdict(self.canvas)
        return out


def _own(rule: Any) -> dict[str, Any]:
    """The fields that a rule is made with; rules in it by name too."""
    mine = {f.name: getattr(rule, f.name) for f in fields(rule) if f.init}
    return {k: {"rule": type(v).__name__, **_own(v)} if is_dataclass(v) else v for k, v in mine.items()}


def _frozen(rule: Any) -> bool:
    return type(rule).__dataclass_params__.frozen


def _integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


EDITING = Policy(rewrite=Edit(), settle=Calm(), accept=0.95)
DMAX = replace(EDITING, select=Leading(), settle=Calm(sure=0.9), embed=Merge(), accept=0.5, edit=0.0)

POLICIES: dict[str, Policy] = {
    "single_bd": Policy(),
    "multi_bd": Policy(N=4),
    "fixed": Policy(select=Fixed(1)),
    # D2F (discrete diffusion forcing): for networks trained all-to-all, by themselves or with its adapters
    "d2f": Policy(N=4, full=True),
    "edit": EDITING,
    "dmax": DMAX,
    "token_merge": replace(DMAX, embed=Smooth()),
    "iter_smooth": Policy(
        select=Threshold(decay=0.02),
        embed=Smooth(k=8, weight=0.3, first=0.15, growth=0.02, of="masks"),
        accept=0.8,
    ),
    "hierarchical": Policy(select=Hierarchical()),
    "credit": Policy(score=Credit()),
    # SDAR's own: L tokens shared out over `steps` forwards
    "sequential": Policy(select=Quota(by="place")),
    "low_confidence_static": Policy(select=Quota()),
    "low_confidence_dynamic": Policy(select=Quota(by="threshold"), accept=0.85),
    "entropy_bounded": Policy(select=EntropyFirst(), accept=0.35),
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
    "topk_margin": Policy(full=True, turn=Whole(blocks=False), select=Annealed(), confidence="margin"),
    "entropy": Policy(full=True, turn=Whole(blocks=False), select=Annealed(), confidence="entropy"),
    "fast_dllm_v2": Policy(full=False, select=Within(8)),
    "fast_dllm_v2_cached": Policy(full=False, select=Within(8), turn=SubBlock(8)),
}


def named(policy: str | Policy) -> Policy:
    """The policy of that name; a Policy passes through. Raises PolicyError for an unknown name."""
    if isinstance(policy, Policy):
        return policy
    if not isinstance(policy, str) or policy not in POLICIES:
        raise PolicyError(f"policy={policy!r} is unknown; use one of {', '.join(POLICIES)}, or pass a Policy")
    return POLICIES[policy]
