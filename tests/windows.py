"""What tests/reference.py decoded, several blocks at once, as what stands behind the prompt after each forward."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference import Decoded, Qwen3
from tests.strategies import Trail, trimmed


class Whole(Qwen3):
    """The same network, in which a prompt of `prompt` tokens sees itself whole; behind it, all to a block's end."""

    prompt = 0

    def __call__(self, ids: list[int], rows: list[int]) -> Tensor:
        at = torch.arange(len(ids))
        end = torch.where(at < self.prompt, self.prompt, (at // self.L + 1) * self.L)
        hidden = at[None, :] >= end[:, None]
        bias = torch.zeros(1, 1, *hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
        with torch.inference_mode():
            return self.net(torch.tensor([ids]), attention_mask=bias, logits_to_keep=torch.tensor(rows)).logits[0]


def walked(decoded: Decoded, prompt: list[int], net: Qwen3) -> Trail:
    """The answer without its stop id, and each forward's state."""
    ids, steps = list(prompt), list[list[int]]()
    for f in decoded.forwards:
        ids[f.base * net.L :] = f.seen
        for pos, tok in f.wrote.items():
            ids[pos] = tok
        steps.append(trimmed(ids[len(prompt) :], net.mask_id))
    return Trail(decoded.kept(), steps)


def excusable(got: Trail, want: Trail, decoded: Decoded) -> bool:
    """Up to where the two part, rounding may have made a decision."""
    unlike = [i for i, (a, b) in enumerate(zip(got.steps, want.steps)) if a != b] or [len(want.steps) - 1]
    return any(f.near() for f in decoded.forwards[: unlike[0] + 1])
