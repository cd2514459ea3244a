"""Select, by a plan of how many: the samplers that came with the models, and Fast-dLLM's other acceptance."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dlx.graphs.rules.seen import NEVER, Candidates, Seen, Select, rank
from dlx.graphs.rules.select import Threshold


@dataclass(frozen=True)
class Factor:
    """Of a block's confidences in falling order, accept the first, and the n-th while it is ≥ 1 − factor / (n + 1).

    Source Fast-dLLM (factor decoding); there the last candidate is accepted even where it alone fails
    """

    factor: float = 1.0

    def __call__(self, c: Candidates, w: Seen) -> Tensor:
        conf = torch.where(w.todo, c.conf, NEVER)
        place = rank(conf)
        fails = (place > 0) & ~(conf >= 1 - self.factor / (place + 2))
        return w.todo & (place < torch.where(fails, place, conf.shape[-1]).amin(-1, keepdim=True))


@dataclass(frozen=True)
class Within:
    """What `select` accepts of the first sub-block of `size` with something to do, as if there were no others.

    Source Fast-dLLM v2
    """

    size: int = 8
    select: Select = field(default_factory=Threshold)

    def __call__(self, c: Candidates, w: Seen) -> Tensor:
        some = w.todo.unflatten(-1, (-1, self.size)).any(-1)
        here = some & (some.int().cumsum(-1) == 1)
        return self.select(c, w._replace(todo=w.todo & here.repeat_interleave(self.size, -1)))


@dataclass(frozen=True)
class Even:
    """Accept the surest positions, as many as decide a block in `steps` forwards: an even split, the remainder first.

    steps   None: one for each position of the block
    random  in a random order instead
    Source LLaDA (low_confidence and random remasking)
    """

    steps: int | None = None
    random: bool = False

    def __call__(self, c: Candidates, w: Seen) -> Tensor:
        assert w.turn is not None and w.span is not None and w.draw is not None, "Policy refuses this without a turn"
        left = ((w.span if self.steps is None else self.steps) - w.turn).clamp_min(1)
        n = (w.todo.sum((1, 2)) + left - 1) // left
        conf = torch.where(w.todo, w.draw if self.random else c.order(), NEVER)
        return w.todo & (rank(conf) < n[:, None, None])


@dataclass(frozen=True)
class Annealed:
    """Accept the surest positions, of m undecided ones ⌊m · (1 − tₙ₊₁ / tₙ)⌋, all in the last of `steps` forwards.

    tₙ      falls evenly from 1 to eps in `steps` forwards
    steps   None: one for each token of the answer
    random  accept each position with probability 1 − tₙ₊₁ / tₙ instead
    Source Dream (maskgit_plus, topk_margin and entropy, which differ in what confidence is; random: origin)
    """

    steps: int | None = None
    eps: float = 1e-3
    random: bool = False

    def __call__(self, c: Candidates, w: Seen) -> Tensor:
        assert w.turn is not None and w.span is not None and w.draw is not None, "Policy refuses this without a turn"
        steps = (w.span if self.steps is None else torch.full_like(w.span, self.steps)).float()
        now, then = (1 - (1 - self.eps) * n / steps for n in (w.turn, w.turn + 1))
        share = torch.where(w.turn + 1 < steps, 1 - then / now, 1.0)
        if self.random:
            return w.todo & (w.draw < share[:, None, None])
        n = (w.todo.sum((1, 2)) * share).int()
        return w.todo & (rank(torch.where(w.todo, c.order(), NEVER)) < n[:, None, None])
