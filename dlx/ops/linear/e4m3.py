# pyright: reportAssignmentType=false, reportArgumentType=false
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
    """e4m3 of an operand in DTYPE; a thread holds ROW neighbours of a row, 2 or 4."""
    if gl.bfloat16 == DTYPE:
        if ROW == 4:
            wide = gl.inline_asm_elementwise(FOUR, "=r,=r,r", [raw], dtype=gl.bfloat16, is_pure=True, pack=4)
        else:
            wide = gl.inline_asm_elementwise(TWO, "=r,h", [raw], dtype=gl.bfloat16, is_pure=True, pack=2)
    else:
        wide = raw.to(DTYPE)
    return wide


@gluon.constexpr_function
def _spread(BK: int, BT: int, WARPS: int):
    """Which of x [BK, BT] a thread loads: 4 along BK in a row. Half a warp takes every second column: its 16 loads of 8
    bytes then fall into all 32 banks, where neighbours among the columns would share some.
    """
    registers = [[1, 0], [2, 0]] + [[1 << i, 0] for i in range(4, BK.bit_length() - 1)] + ([[0, 8]] if BT == 16 else [])
    lanes = [[4, 0], [8, 0], [0, 2], [0, 4], [0, 1]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0]] * (WARPS.bit_length() - 1), [], [BK, BT])


# An mma's thread wants two pairs along K, 8 apart; ours holds four in a row, of w (by `ldmatrix`) and of x. As products
# may be summed in any order, `rows` and `columns` call these four the two pairs: no number moves, only names change.
# The halves of BK are two chains of products, so that one need not wait for the other's sum.


@gluon.jit
def rows(w, DTYPE: gl.constexpr, ACC: gl.constexpr, SUB: gl.constexpr, BK: gl.constexpr):
    """A tile of weights [SUB, BK] as left operands: its halves [SUB, BK / 2]."""
    LOAD: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=4)
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=2)
    wide = gl.reshape(widened(w.load(LOAD), DTYPE, 4), [SUB, 2, BK // 32, 4, 2, 2])
    low, high = gl.split(gl.permute(wide, [0, 2, 4, 3, 5, 1]))
    low = gl.convert_layout(gl.reshape(low, [SUB, BK // 2]), A)
    return low, gl.convert_layout(gl.reshape(high, [SUB, BK // 2]), A)


@gluon.jit
def columns(x, ACC: gl.constexpr, BK: gl.constexpr, BT: gl.constexpr, WARPS: gl.constexpr):
    """A tile of activations [BK, BT] as right operands, columns as `_spread` takes them: its halves [BK / 2, BT]."""
    LOAD: gl.constexpr = _spread(BK, BT, WARPS)
    B: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=ACC, k_width=2)
    right = gl.reshape(x.load(LOAD), [2, BK // 32, 4, 2, 2, BT // 8, 4, 2])
    low, high = gl.split(gl.permute(right, [1, 3, 2, 4, 5, 7, 6, 0]))
    low = gl.convert_layout(gl.reshape(low, [BK // 2, BT]), B)
    return low, gl.convert_layout(gl.reshape(high, [BK // 2, BT]), B)


@gluon.jit
def ordered(acc, SUB: gl.constexpr, BT: gl.constexpr):
    """A sum of products [SUB, BT] with its columns in the order of the activations."""
    return gl.reshape(gl.permute(gl.reshape(acc, [SUB, BT // 8, 2, 4]), [0, 1, 3, 2]), [SUB, BT])
