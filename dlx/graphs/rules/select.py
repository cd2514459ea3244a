"""Select: which candidates are accepted now?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlx.graphs.rules.seen import NEVER, Candidates, Seen, rank


@dataclass(frozen=True)
class Threshold:
    """Accept what is surer than `accept`; if the block before is `force_at` complete and nothing is, accept the best.

    Source Fast-dLLM (threshold), Diffulex (forced progress of the running set); strict `>`
    """

    def __call__(self, c: Candidates, w: Seen) -> Tensor:
        conf = torch.where(w.todo, c.conf, NEVER)
        take = conf > w.accept[:, None, None]
        stuck = (w.before >= w.force_at[:, None]) & ~take.any(-1)
        return w.todo & (take | (rank(conf) == 0) & stuck[..., None])


@dataclass(frozen=True)
class Fixed:
    """Accept the `k` surest positions of the first undecided block: the forced schedule of benchmarks."""

    k: int = 1

    def __call__(self, c: Candidates, w: Seen) -> Tensor:
        conf = torch.where(w.todo, c.conf, NEVER)
        some = w.todo.any(-1)
        first = some & (some.int().cumsum(-1) == 1)
        return w.todo & (rank(conf) < self.k) & first[..., None]


@dataclass(frozen=True)
class EntropyBound:
    """Of a canvas: accept the positions of least entropy whose predecessors' entropies sum up to `accept` at most.

    Source transformers' EntropyBoundSampler (arXiv 2505.24857); the position of least entropy is always accepted
    """

    def __call__(self, c: Candidates, w: Seen) -> Tensor:
        assert c.entropy is not None, "Policy refuses this rule without a canvas"
        at = torch.arange(c.entropy.shape[-1], device=c.entropy.device)
        mine, other = c.entropy[..., :, None], c.entropy[..., None, :]
        ahead = (other < mine) | (other == mine) & (at < at[:, None])
        return w.live & (torch.where(ahead, other, 0.0).sum(-1) <= w.accept[:, None, None])
