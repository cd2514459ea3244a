"""The integers that turn fp8 pages into bf16, run instruction by instruction, give what torch's cast gives, lifted."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl

from dlx.ops.attention import fp8
from dlx.ops.attention.fp8 import FOUR, FOUR_E5M2, KINDS
from tests.instructions import executed

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.mark.parametrize(("asm", "dtype"), [(FOUR, E4M3), (FOUR_E5M2, E5M2)], ids=["e4m3", "e5m2"])
def test_every_fp8_number_is_what_torch_makes_of_it_times_a_power(asm: tl.constexpr, dtype: torch.dtype) -> None:
    byte = torch.arange(256)
    row = torch.stack([(byte + 85 * i) % 256 for i in range(4)], -1)  # each byte in each place, beside others
    word = (row << 8 * torch.arange(4)).sum(-1)
    lift = KINDS[dtype][1]
    got = executed(asm.value, 2, word).double() * 4.0**lift
    want = row.to(torch.uint8).view(dtype).double()
    assert torch.equal(got[want.isfinite()], want[want.isfinite()])
    least = 480 if dtype == E4M3 else 2**16
    assert (got[~want.isfinite()].abs() >= least).all()
    assert torch.equal(got.signbit(), row >= 128)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_only_bf16_queries_on_a_gpu_and_the_interpreter_are_lifted(dtype: torch.dtype) -> None:
    kv = torch.zeros(1).to(dtype)
    assert fp8.fp8(kv, torch.zeros(1)) == KINDS[dtype]
    assert fp8.fp8(torch.zeros(1), torch.zeros(1)) == (None, 0)
