"""dlx's counter-based random draws, restated in integers, in place of torch's where transformers' generate draws."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LOW = 0xFFFFFFFF


def philox(counter: tuple[int, int, int, int], seed: int) -> int:
    """The first word of Philox4x32-10 (Salmon et al., 2011)."""
    a, b, c, d = counter
    k, m = seed & LOW, seed >> 32
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (q >> 32) ^ b ^ k, q & LOW, (p >> 32) ^ d ^ m, p & LOW
        k, m = (k + 0x9E3779B9) & LOW, (m + 0xBB67AE85) & LOW
    return a


class Draws:
    """One request's draws, in the order in which generate asks: a canvas, then a token and noise a position a forward.

    forwards  decoder forwards so far
    """

    def __init__(self, seed: int, start: int, L: int) -> None:
        self.seed, self.start, self.L = seed, start - L, L
        self.forwards, self.within = 0, False

    def randint(self, low: int = 0, high: int = 0, size: Any = (), **_: Any) -> Tensor:
        """Stands for torch.randint."""
        assert low == 0 and tuple(size) == (1, self.L)
        self.start += 0 if self.within else self.L  # without a token before it, it is a new canvas
        self.within = False
        words = [philox((0, self.start + i, self.forwards, 1), self.seed) for i in range(self.L)]
        return torch.tensor([[word * high >> 32 for word in words]])

    def multinomial(self, p: Tensor, num_samples: int = 1, **_: Any) -> Tensor:
        """Stands for torch.multinomial: argmax of ln p + Gumbel noise."""
        assert num_samples == 1 and p.shape[0] == self.L
        words = [
            [philox((v, self.start + i, self.forwards, 0), self.seed) >> 9 for v in range(p.shape[1])]
            for i in range(self.L)
        ]
        u = (torch.tensor(words, dtype=torch.float32) + 0.5) * 2.0**-23
        self.forwards, self.within = self.forwards + 1, True
        return (p.log() - torch.log(-torch.log(u))).argmax(-1, keepdim=True)
