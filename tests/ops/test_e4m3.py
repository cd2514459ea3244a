"""The integers that turn fp8 weights into bf16, run instruction by instruction, give what torch's cast gives."""

from __future__ import annotations

import pytest
import torch

from dlx.ops.linear.e4m3 import FOUR, TWO
from tests.instructions import executed

NANS = [0x7F, 0xFF]


@pytest.mark.parametrize(("asm", "ROW"), [(FOUR.value, 4), (TWO.value, 2)], ids=["four", "two"])
def test_every_fp8_number_is_the_bf16_that_torch_makes_of_it(asm: str, ROW: int) -> None:
    byte = torch.arange(256)
    row = torch.stack([(byte + 85 * i) % 256 for i in range(ROW)], -1)  # each byte in each place, beside others
    word = (row << 8 * torch.arange(ROW)).sum(-1)
    got = executed(asm, ROW // 2, word)
    want = row.to(torch.uint8).view(torch.float8_e4m3fn).to(torch.bfloat16)
    nan = torch.isin(row, torch.tensor(NANS))
    assert torch.equal(got.view(torch.int16)[~nan], want.view(torch.int16)[~nan])
    assert want[nan].isnan().all()
    assert torch.equal(got[nan].abs(), torch.full_like(got[nan], 480))
