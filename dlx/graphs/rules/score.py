"""Score: what are the candidates worth, all considered?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlx.graphs.rules.seen import Asks, Candidates, Memory, Seen, paired

HELD = "credit"  # [B, N, L, 2, slots] f32: ids (+ 1; 0: free) paired with their sums


@dataclass(frozen=True)
class Plain:
    """What the sampler says."""

    def __call__(self, c: Candidates, w: Seen) -> Candidates:
        return c


@dataclass(frozen=True)
class Credit:
    """Ids that were likeliest at an undecided position before earn credit there, which raises their logits.

        C ← beta · C;  C[likeliest] ← C[likeliest] + p ** gamma;  logits + alpha · ln(1 + C)

    k      ids a position whose logits are raised, of its likeliest: those with credit elsewhere are too unlikely to win
    slots  ids a position that keep credit, the most of it
    The distribution with raised logits has p · (1 + C) ** (alpha / temperature), normalised: no second look at the
    head. A drawn token stays; greedily the likeliest is taken anew. With top_k or top_p an id filtered out stays out.
    Source dInfer (credit decoding), which keeps C for the whole vocabulary
    """

    alpha: float = 0.7
    gamma: float = 0.2
    beta: float = 0.8
    k: int = 8
    slots: int = 4

    @property
    def asks(self) -> Asks:
        return Asks(k=self.k)

    def memory(self, L: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {HELD: ((L, 2, self.slots), torch.float32)}

    def keep(self, c: Candidates, w: Seen, tok: Tensor, whole: Tensor) -> Memory:
        return {HELD: paired(*self._credit(c, w))}

    def _credit(self, c: Candidates, w: Seen) -> tuple[Tensor, Tensor]:
        """Ids and sums [B, N, L, slots] with this forward's credit; its likeliest id takes the place of the least."""
        assert c.top is not None and c.likely is not None, "the step gives what asks says"
        ids, sums = w.mem[HELD][..., 0, :], self.beta * w.mem[HELD][..., 1, :]
        best, p = (c.top[..., :1] + 1).float(), c.likely[..., :1]
        has = ids == best
        least = torch.arange(self.slots, device=ids.device) == sums.argmin(-1, keepdim=True)
        at = torch.where(has.any(-1, keepdim=True), has, least) & w.todo[..., None]
        earned = torch.where(has, sums, 0.0) + p**self.gamma
        return torch.where(at, best, ids), torch.where(at, earned, sums)

    def __call__(self, c: Candidates, w: Seen) -> Candidates:
        assert c.top is not None and c.likely is not None and w.temp is not None, "the step gives what asks says"
        ids, sums = self._credit(c, w)
        mine = (c.top[..., :, None] + 1).float() == ids[..., None, :]
        C = torch.where(mine, sums[..., None, :], 0.0).sum(-1)
        warm = (w.temp > 0)[:, None, None]
        power = self.alpha / torch.where(w.temp > 0, w.temp, 1.0)[:, None, None, None]
        raised = c.likely * (1 + C) ** power
        total = 1 + (raised - c.likely).sum(-1)
        at = raised.argmax(-1, keepdim=True)
        drawn = torch.where(c.top == c.tok[..., None], raised, 0.0).sum(-1)
        drawn = torch.where(drawn > 0, drawn, c.conf)
        tok = torch.where(warm, c.tok, c.top.gather(-1, at)[..., 0])
        conf = torch.where(warm, drawn, raised.gather(-1, at)[..., 0]) / total
        return c._replace(tok=tok, conf=conf)
