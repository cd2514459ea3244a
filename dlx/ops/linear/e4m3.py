# pyright: reportArgumentType=false
"""fp8 weights in the dtype of the activations, in the registers of a matmul on sm_90, exactly.

The hardware turns e4m3 into fp16, two numbers an instruction; from fp16 to bf16 it takes one each, on a slow pipe. So
bf16 is made by integers, two bytes at once: `prmt` puts each byte into the lower half of 16 bits and its sign into all
of the upper half, a shift moves exponent and mantissa to their places, a mask leaves them and one sign. That is the
value · 2⁻¹²⁰, for subnormals too, and a product with 2¹²⁰ is exact. The NaNs, 0x7f and 0xff, turn into ±480.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# a register of four bytes in two of bf16 pairs
FOUR = gl.constexpr("""{
    .reg .b32 low, high, power;
    mov.b32 power, 0x7B807B80;
    prmt.b32 low, $2, 0, 0x9180;
    prmt.b32 high, $2, 0, 0xB3A2;
    shl.b32 low, low, 4;
    shl.b32 high, high, 4;
    and.b32 low, low, 0x87F087F0;
    and.b32 high, high, 0x87F087F0;
    mul.rn.bf16x2 $0, low, power;
    mul.rn.bf16x2 $1, high, power;
}""")
# two bytes in a bf16 pair
TWO = gl.constexpr("""{
    .reg .b32 low, power;
    mov.b32 power, 0x7B807B80;
    cvt.u32.u16 low, $1;
    prmt.b32 low, low, 0, 0x9180;
    shl.b32 low, low, 4;
    and.b32 low, low, 0x87F087F0;
    mul.rn.bf16x2 $0, low, power;
}""")


@gluon.jit
def widened(raw, DTYPE: gl.constexpr, ROW: gl.constexpr):
    """e4m3 of an operand in DTYPE; a thread holds ROW neighbours of a row, 2 or more."""
    if gl.bfloat16 == DTYPE:
        if ROW % 4 == 0:
            wide = gl.inline_asm_elementwise(FOUR, "=r,=r,r", [raw], dtype=gl.bfloat16, is_pure=True, pack=4)
        else:
            wide = gl.inline_asm_elementwise(TWO, "=r,h", [raw], dtype=gl.bfloat16, is_pure=True, pack=2)
    else:
        wide = raw.to(DTYPE)
    return wide
