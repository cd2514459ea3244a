"""The losses: recover what is masked, then recover the clean tokens from the network's own guesses.

Dims: M masked tokens of a batch, others as in noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.tiny.network import Mask, Network
from tools.tiny.noise import Noise, Rows
from tools.tiny.vocabulary import MASK

STAY_MASKED = 0.15  # share of the masked tokens that the on-policy pass does not fill
Layers = Iterable[Callable[..., Tensor]]


class Target(NamedTuple):
    """The masked tokens: where, what they are, and what each counts."""

    b: Tensor  # [M] int64
    at: Tensor  # [M] int64
    ids: Tensor  # [M] int64
    weight: Tensor  # [M] f32, sums to 1


class Loss(NamedTuple):
    """A weighted sum to differentiate, and what it was made of."""

    total: Tensor  # [] f32
    each: Tensor  # [M] f32   cross entropy
    logits: Tensor  # [M, V] f32


def target(rows: Rows, noise: Noise, power: float) -> Target:
    """The masked tokens, weighted by a power of their block's weight."""
    b, at = noise.masked.nonzero(as_tuple=True)
    weight = noise.weight[b, at] ** power
    return Target(b, at, rows.ids[b, at], weight / weight.sum())


def recover(
    network: Network,
    layers: Layers,
    rows: Rows,
    noisy: Tensor,
    mask: Mask,
    goal: Target,
    embedded: Tensor | None = None,
) -> Loss:
    """The loss of predicting the targets from [noisy | clean] rows; `noisy` [B, R] int64."""
    both = torch.cat((noisy, rows.ids), 1)
    hidden = network(both, torch.cat((rows.pos, rows.pos), 1), mask, embedded, layers)
    logits = network.logits(hidden[goal.b, goal.at])
    each = F.cross_entropy(logits, goal.ids, reduction="none")
    return Loss((each * goal.weight).sum(), each, logits)


def masked_rows(rows: Rows, noise: Noise) -> Tensor:
    """[B, R] int64: the rows with their masked tokens hidden."""
    return torch.where(noise.masked, MASK, rows.ids)


def own_guesses(
    network: Network,
    rows: Rows,
    noisy: Tensor,
    goal: Target,
    logits: Tensor,
    generator: torch.Generator,
    *,
    drawn: bool,
    soft: bool,
    clean: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """The noisy rows filled in by the network itself, with embeddings if these are to be soft.

    drawn  guesses are drawn from the distribution; else the most probable token
    soft   a guess is seen as its embedding and the mask's, mixed by its probability: for soft decoding
    clean  most of a row's guesses that the clean token stands in for, the share drawn evenly from 0: what is wrong is
           then wrong beside what is right, and can be told by it
    →      [B, R] int64, and [B, 2R, E] or None
    """
    p = logits.detach().softmax(-1)
    guess = torch.multinomial(p, 1, generator=generator)[:, 0] if drawn else p.argmax(-1)
    kept = torch.rand(guess.shape, device=guess.device, generator=generator) < STAY_MASKED
    if clean:
        share = clean * torch.rand(len(rows.ids), device=guess.device, generator=generator)
        told = torch.rand(guess.shape, device=guess.device, generator=generator) < share[goal.b]
        guess = torch.where(told, goal.ids, guess)
    filled = noisy.clone()
    filled[goal.b, goal.at] = torch.where(kept, MASK, guess)
    if not soft:
        return filled, None
    embedded = network.embed_tokens(torch.cat((filled, rows.ids), 1))
    share = torch.ones_like(embedded[..., :1])
    sure = torch.where(kept, 1.0, p.gather(1, guess[:, None])[:, 0])
    share[goal.b, goal.at] = sure[:, None].to(share.dtype)
    return filled, embedded * share + network.embed_tokens.weight[MASK].to(embedded.dtype) * (1 - share)
