# pyright: reportAssignmentType=false, reportArgumentType=false
"""fp8 keys and values in the dtype of the queries, in registers.

The hardware turns e4m3 into fp16, two numbers an instruction; from fp16 to bf16 it takes one each, on a slow pipe. So
bf16 is made by integers, two bytes at once: `prmt` puts each byte into the lower half of 16 bits and its sign into all
of the upper half, a shift moves exponent and mantissa to their places, a mask leaves them and one sign. That is the
value · 2⁻¹²⁰ (e5m2: 2⁻¹¹²), for subnormals too. LIFT makes up for it: queries and weights are multiplied by 2^LIFT,
half of that power, and the sums of products once more. So nothing overflows that is below 2⁶⁰, and a product that is
lost, below 2⁻¹²⁶, would have been below 2⁻⁶⁶. NaN and infinity turn into numbers: ±480 from e4m3, ±2¹⁶ and
up from e5m2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def integers(selectors: tuple[int, ...], shift: int, mask: int) -> tl.constexpr:
    """Four bytes of a register in bf16: two of them for each selector of `prmt`. All is read before it is written."""
    n = len(selectors)
    asm = [f"prmt.b32 x{i}, ${n}, 0, {selector:#x};" for i, selector in enumerate(selectors)]
    asm += [f"shl.b32 x{i}, x{i}, {shift};\nand.b32 ${i}, x{i}, {mask:#x};" for i in range(n)]
    return tl.constexpr("\n".join(["{", f".reg .b32 x<{n}>;", *asm, "}"]))


E4M3, E5M2 = (4, 0x87F087F0), (5, 0x8FE08FE0)
FOUR, FOUR_E5M2 = (integers((0x9180, 0xB3A2), *kind) for kind in (E4M3, E5M2))
KINDS = {torch.float8_e4m3fn: (tl.float8e4nv, 60), torch.float8_e5m2: (tl.float8e5, 56)}


def fp8(kv: Tensor, q: Tensor) -> tuple[tl.dtype | None, int]:
    """(FP8, LIFT) of the kernel: None unless kv is fp8; 0 where it is cast."""
    kind, lift = KINDS.get(kv.dtype, (None, 0))
    return kind, lift if q.dtype == torch.bfloat16 or not q.is_cuda else 0


@triton.jit
def _made(byte, FP8: tl.constexpr):
    """As the integers make it, in fp32, for the interpreter."""
    SHIFT: tl.constexpr = 20 if tl.float8e4nv == FP8 else 21
    return (((byte & 128) << 24) | ((byte & 127) << SHIFT)).to(tl.float32, bitcast=True)


@triton.jit
def _whole(x, FP8: tl.constexpr, DTYPE: tl.constexpr, LIFT: tl.constexpr, UPCAST: tl.constexpr):
    """Numbers of a page in DTYPE; of fp8 they come as bytes."""
    if FP8 is None:
        wide = x.to(DTYPE)
    elif LIFT == 0:
        wide = x.to(FP8, bitcast=True).to(DTYPE)
    elif UPCAST:
        wide = _made(x.to(tl.int32), FP8)
    else:
        ASM: tl.constexpr = FOUR if tl.float8e4nv == FP8 else FOUR_E5M2
        wide = tl.inline_asm_elementwise(ASM, "=r,=r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=4)
    return wide
