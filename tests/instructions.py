"""PTX as inline assembly, run on the CPU: the few instructions that turn fp8 into bf16."""

from __future__ import annotations

import re

import torch
from torch import Tensor

WORD = 0xFFFFFFFF


def prmt(x: Tensor, zero: Tensor, selector: int) -> Tensor:
    """Bytes picked by the selector's nibbles; with 8 in a nibble the byte's sign eight times."""
    found = torch.zeros_like(x)
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = (x | zero << 32) >> 8 * (nibble & 7) & 255
        found |= (torch.where(byte >= 128, 255, 0) if nibble & 8 else byte) << 8 * i
    return found


def bf16(x: Tensor) -> Tensor:
    """The two numbers of a 32-bit register, the lower one first."""
    half = torch.stack([x & 0xFFFF, x >> 16], -1)
    return torch.where(half >= 1 << 15, half - (1 << 16), half).to(torch.int16).view(torch.bfloat16)


def product(x: Tensor, y: Tensor) -> Tensor:
    half = (bf16(x) * bf16(y)).view(torch.int16).long() & 0xFFFF
    return half[..., 0] | half[..., 1] << 16


def executed(asm: str, outputs: int, word: Tensor) -> Tensor:
    """The asm's outputs, one after the other, for an input register."""
    registers = {f"${outputs}": word}

    def value(name: str) -> Tensor:
        return registers[name] if name in registers else torch.full_like(word, int(name, 0))

    lines = [line.strip() for line in asm.strip("{}\n").split(";")]
    for line in filter(None, lines):
        op, _, rest = line.partition(" ")
        if op == ".reg":
            continue
        into, *names = re.split(r",\s*", rest)
        x, *more = (value(name) for name in names)
        if op in ("mov.b32", "cvt.u32.u16"):
            registers[into] = x
        elif op == "prmt.b32":
            registers[into] = prmt(x, more[0], int(names[2], 0))
        elif op == "shl.b32":
            registers[into] = x << more[0] & WORD
        elif op == "and.b32":
            registers[into] = x & more[0]
        elif op == "mul.rn.bf16x2":
            registers[into] = product(x, more[0])
        else:
            raise AssertionError(line)
    return torch.cat([bf16(registers[f"${i}"]) for i in range(outputs)], -1)
