"""Select: which candidates are accepted now?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlx.graphs.rules.seen import NEVER, Asks, Candidates, Memory, Seen, ahead, rank

TURN = "turn"  # [B, N] int32  forwards in which a block was decided on


@dataclass(frozen=True)
class Threshold:
    """Accept what is surer than `accept`; if the block before is `force_at` complete and nothing is, accept the best.

    decay  the bar begins at 1 and falls by so much a forward of the row, down to `accept`; 0: it is `accept`
    Source Fast-dLLM (threshold), Diffulex (forced progress of the running set), dInfer (decay); strict `>`
    """

    decay: float = 0.0

    def __call__(self, c: Candidates, w: Seen) -> Tensor:
        bar = w.accept
        if self.decay:
            assert w.age is not None, "a canvas tells no age"
            bar = torch.maximum(1.0 - self.decay * w.age.float(), bar)
        conf = torch.where(w.todo, c.conf, NEVER)
        take = conf > bar[:, None, None]
        stuck = (w.before >= w.force_at[:, None]) & ~take.any(-1)
        best = conf if c.rank is None else torch.where(w.todo, c.rank, NEVER)
        return w.todo & (take | (rank(best) == 0) & stuck[..., None])


@dataclass(frozen=True)
class Fixed:
    """Accept the `k` surest positions of the first undecided block: the forced schedule of benchmarks."""

    k: int = 1

    def __call__(self, c: Candidates, w: Seen) -> Tensor:
        conf = torch.where(w.todo, c.order(), NEVER)
        some = w.todo.any(-1)
        first = some & (some.int().cumsum(-1) == 1)
        return w.todo & (rank(conf) < self.k) & first[..., None]


@dataclass(frozen=True)
class Leading:
    """Accept masks from the left up to the first that is less sure than `accept`, and the first one anyway.

    Anyway only if the block before is `force_at` complete. Source DMax; `>=` is sure enough
    """

    def __call__(self, c: Candidates, w: Seen) -> Tensor:
        weak = w.todo & ~(c.conf >= w.accept[:, None, None])
        first = w.todo & (w.todo.int().cumsum(-1) == 1)
        return w.todo & (weak.int().cumsum(-1) == 0) | first & w.ready()


@dataclass(frozen=True)
class Hierarchical:
    """Accept what is surer than `accept`, and of each run of masks the surest if it is surer than `low`.

    If neither is there, the best, if the block before is `force_at` complete. Source dInfer (hierarchical decoding);
    a run accepts one of several that are equally sure, the lowest
    """

    low: float = 0.4

    def __call__(self, c: Candidates, w: Seen) -> Tensor:
        conf = torch.where(w.todo, c.conf, NEVER)
        run = (~w.todo).int().cumsum(-1)
        same = run[..., :, None] == run[..., None, :]
        lesser = (ahead(conf) & same & w.todo[..., None, :]).any(-1)
        take = (conf > w.accept[:, None, None]) | ~lesser & (conf > self.low)
        best = torch.where(w.todo, c.order(), NEVER)
        return w.todo & (take | (rank(best) == 0) & ~take.any(-1, keepdim=True) & w.ready())


@dataclass(frozen=True)
class Quota:
    """Accept n of a block's masks a forward: L tokens shared out over `steps` forwards, the larger shares first.

    steps    None: L, so that n is 1
    by       rank: the surest; place: the n positions from the first mask on; threshold: all that are surer than
             `accept` if that are n at least, else the surest
    Only if the block before is `force_at` complete, but for the threshold.
    Source SDAR (low_confidence_static, sequential, low_confidence_dynamic); `sequential` leaves decided tokens alone
    """

    steps: int | None = None
    by: str = "rank"

    def memory(self, L: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {} if self.steps is None or L % self.steps == 0 else {TURN: ((), torch.int32)}

    def keep(self, c: Candidates, w: Seen, tok: Tensor, whole: Tensor) -> Memory:
        return {TURN: w.mem[TURN] + 1} if TURN in w.mem else {}

    def __call__(self, c: Candidates, w: Seen) -> Tensor:
        L = w.todo.shape[-1]
        n: Tensor | int = max(1, L // (self.steps or L))
        if TURN in w.mem and self.steps is not None:
            n = torch.clamp_min(L // self.steps + (w.mem[TURN] < L % self.steps).int(), 1)[..., None]
        if self.by == "place":
            at = torch.arange(L, device=w.todo.device)
            first = torch.where(w.todo, at, L).amin(-1, keepdim=True)
            return w.todo & (at < first + n) & w.ready()
        take = w.todo & (rank(torch.where(w.todo, c.order(), NEVER)) < n) & w.ready()
        if self.by == "rank":
            return take
        sure = w.todo & (c.conf > w.accept[:, None, None])
        return torch.where(sure.sum(-1, keepdim=True) >= n, sure, take | sure)


@dataclass(frozen=True)
class EntropyFirst:
    """Accept the masks of least entropy while the sum of their entropies is below `accept`, and the first one anyway.

    Anyway only if the block before is `force_at` complete. Source SDAR, JetEngine (entropy_bounded)
    """

    asks = Asks(entropy=True)

    def __call__(self, c: Candidates, w: Seen) -> Tensor:
        assert c.entropy is not None
        mine = torch.where(w.todo, c.entropy, -NEVER)
        less = ahead(-mine)
        total = torch.where(less & w.todo[..., None, :], c.entropy[..., None, :], 0.0).sum(-1) + c.entropy
        return w.todo & ((total < w.accept[:, None, None]) | ~less.any(-1) & w.ready())


@dataclass(frozen=True)
class EntropyBound:
    """Of a canvas: accept the positions of least entropy whose predecessors' entropies sum up to `accept` at most.

    Source transformers' EntropyBoundSampler (arXiv 2505.24857); the position of least entropy is always accepted
    """

    def __call__(self, c: Candidates, w: Seen) -> Tensor:
        assert c.entropy is not None, "Policy refuses this rule without a canvas"
        less = torch.where(ahead(-c.entropy), c.entropy[..., None, :], 0.0)
        return w.live & (less.sum(-1) <= w.accept[:, None, None])
