"""Muon: momentum, orthogonalised by a Newton-Schulz iteration.

Source  K. Jordan et al. 2024, coefficients of the quintic iteration; update scaled to AdamW's RMS as in
        J. Liu et al. 2025 (0.2 · √max(rows, columns)). Matrices of one shape are updated as one stack.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

STEPS = 5
A, B, C = 3.4445, -4.7750, 2.0315
RMS = 0.2
MOMENTUM = 0.95


class Muon:
    """Optimizer of matrices; `lr` may be set between steps."""

    def __init__(self, weights: Iterable[nn.Parameter], lr: float, decay: float) -> None:
        self.lr, self.decay = lr, decay
        self.stacks: dict[tuple[int, int], list[nn.Parameter]] = {}
        for weight in weights:
            rows, columns = weight.shape
            self.stacks.setdefault((rows, columns), []).append(weight)
        self.moments = {
            size: torch.zeros(len(stack), *size, device=stack[0].device) for size, stack in self.stacks.items()
        }

    @torch.no_grad()
    def step(self) -> None:
        """Update every weight by its gradient."""
        for size, stack in self.stacks.items():
            moment = self.moments[size]
            gradient = torch.stack([weight.grad for weight in stack if weight.grad is not None])
            moment.lerp_(gradient, 1 - MOMENTUM)
            update = orthogonal(gradient.lerp(moment, MOMENTUM))
            scale = self.lr * RMS * math.sqrt(max(size))
            for weight, change in zip(stack, update.unbind(0), strict=True):
                weight.mul_(1 - self.lr * self.decay).sub_(change, alpha=scale)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for stack in self.stacks.values():
            for weight in stack:
                weight.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """The moments, by shape."""
        return {f"{rows}x{columns}": moment for (rows, columns), moment in self.moments.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take moments that `state_dict` gave."""
        for (rows, columns), moment in self.moments.items():
            moment.copy_(state[f"{rows}x{columns}"])


def orthogonal(stack: Tensor) -> Tensor:
    """[n, rows, columns] → nearly orthogonal matrices with the same row and column spaces; bf16 on CUDA."""
    tall = stack.shape[-2] > stack.shape[-1]
    x = stack.bfloat16() if stack.is_cuda else stack
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = A * x + (B * gram + C * (gram @ gram)) @ x
    return (x.mT if tall else x).to(stack.dtype)
