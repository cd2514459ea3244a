"""A prompt prefilled whole, in chunks, or padded leaves the same K/V."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dlx.config import Config
from dlx.graphs import prefill
from dlx.worker import Worker

PROMPT = [5 + i % 40 for i in range(64)]


def pages_after(nano: Path, chunks: list[tuple[int, int]], T: int, poison: bool = False) -> Tensor:
    """Layer 1's pages after these (start, end) chunks in a bucket of T."""
    worker = Worker(Config.from_args(nano, device="cpu", max_num_seqs=1, max_model_len=128))
    if poison:
        for kv in worker.kv:
            kv.fill_(float("nan"))
    prompt = prefill.blank(T, worker.shapes.W, torch.device("cpu"))
    for low, high in chunks:
        packed = prefill.pack(PROMPT[low:high], low, [3, 1, 0, 2], T, worker.shapes.W)
        prefill.fill_(prompt, packed)
        prefill.prefill_(worker.L, worker.net, prompt, worker.kv)
    return worker.kv[1]


def test_chunks_leave_what_the_whole_prompt_leaves(nano: Path) -> None:
    whole = pages_after(nano, [(0, 64)], 64)
    assert whole[:, :4].abs().sum() > 0
    for chunks in ([(0, 16), (16, 64)], [(0, 32), (32, 48), (48, 64)]):
        torch.testing.assert_close(pages_after(nano, chunks, 64), whole, rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing_and_writes_nothing(nano: Path) -> None:
    torch.testing.assert_close(
        pages_after(nano, [(0, 64)], 112), pages_after(nano, [(0, 64)], 64), rtol=1e-5, atol=1e-5
    )
    poisoned = pages_after(nano, [(0, 48)], 64, poison=True)
    table = [3, 1, 0, 2]
    assert poisoned[:, table[:3]].isfinite().all()
    assert poisoned[:, table[3]].isnan().all()
    assert poisoned[:, 4:].isnan().all()
