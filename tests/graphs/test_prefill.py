"""A prompt prefilled whole, in chunks, or padded leaves the same K/V."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dlx.config import Config
from dlx.graphs import prefill
from dlx.worker import Worker

PROMPT = [5 + i % 40 for i in range(64)]


def pages_after(
    nano: Path, chunks: list[tuple[int, int]], T: int, poison: bool = False, kind: str | None = None
) -> Tensor:
    """Layer 1's pages after these (start, end) chunks in a bucket of T."""
    worker = Worker(Config.from_args(nano, device="cpu", max_num_seqs=1, max_model_len=128, kv_cache_dtype=kind))
    if poison:
        for kv in worker.kv:
            kv.fill_(float("nan"))
    C, W = worker.shapes.C, worker.shapes.W
    prompt = prefill.blank(T // C, C, W, torch.device("cpu"))
    for low, high in chunks:
        (batch,) = prefill.batches([prefill.Stretch(PROMPT[low:high], low, [3, 1, 0, 2])], C, T // C)
        prefill.fill_(prompt, prefill.pack(batch, T // C, C, W))
        prefill.prefill_(worker.L, worker.net, prompt, worker.kv)
    return worker.kv[1]


def test_chunks_leave_what_the_whole_prompt_leaves(nano: Path) -> None:
    whole = pages_after(nano, [(0, 64)], 64)
    assert whole[:, :4].abs().sum() > 0
    for chunks in ([(0, 16), (16, 64)], [(0, 32), (32, 48), (48, 64)]):
        torch.testing.assert_close(pages_after(nano, chunks, 64), whole, rtol=1e-5, atol=1e-5)


def test_fp8_pages_do_not_depend_on_the_forwards_that_wrote_them(nano: Path) -> None:
    whole = pages_after(nano, [(0, 64)], 64, kind="fp8").float()
    assert (whole[:, :4] != 0).any()
    for chunks in ([(0, 16), (16, 64)], [(0, 32), (32, 48), (48, 64)]):
        other = pages_after(nano, chunks, 64, kind="fp8").float()
        assert (other != whole).float().mean() < 1e-3  # fp32 sums in another order; a rounding may fall otherwise


def test_padding_changes_nothing_and_writes_nothing(nano: Path) -> None:
    torch.testing.assert_close(
        pages_after(nano, [(0, 64)], 128), pages_after(nano, [(0, 64)], 64), rtol=1e-5, atol=1e-5
    )
    poisoned = pages_after(nano, [(0, 48)], 64, poison=True)
    table = [3, 1, 0, 2]
    assert poisoned[:, table[:3]].isfinite().all()
    assert poisoned[:, table[3]].isnan().all()
    assert poisoned[:, 4:].isnan().all()


def test_prompts_prefilled_together_leave_what_they_leave_apart(nano: Path) -> None:
    prompts = [
        prefill.Stretch(PROMPT, 0, [3, 1, 0, 2]),
        prefill.Stretch([7 + i % 30 for i in range(80)], 0, [4, 5, 6, 7, 8]),
    ]
    after = []
    for together in (True, False):
        worker = Worker(Config.from_args(nano, device="cpu", max_num_seqs=2, max_model_len=160))
        C, W, R = worker.shapes.C, worker.shapes.W, 3
        prompt = prefill.blank(R, C, W, torch.device("cpu"))
        for group in [prompts] if together else [[p] for p in prompts]:
            for batch in prefill.batches(group, C, R):
                prefill.fill_(prompt, prefill.pack(batch, R, C, W))
                prefill.prefill_(worker.L, worker.net, prompt, worker.kv)
        after.append(worker.kv[1])
    assert all(after[0][:, page].any() for page in range(9))
    torch.testing.assert_close(after[0], after[1], rtol=1e-5, atol=1e-5)


def test_chunks_are_cut_into_stretches_in_their_order() -> None:
    chunks = [prefill.Stretch(list(range(10)), 20, [1]), prefill.Stretch([7, 8], 0, [2])]
    got = list(prefill.batches(chunks, 4, 3))
    assert [[(s.tok, s.start, s.pages) for s in batch] for batch in got] == [
        [([0, 1, 2, 3], 20, [1]), ([4, 5, 6, 7], 24, [1]), ([8, 9], 28, [1])],
        [([7, 8], 0, [2])],
    ]


def test_a_prompt_that_sees_itself_whole_is_not_parted() -> None:
    chunks = [prefill.Stretch(list(range(n)), 0, [n], n) for n in (9, 4, 5, 12)]
    got = list(prefill.batches(chunks, 4, 4))
    assert [[(s.start, s.pages[0], s.end) for s in batch] for batch in got] == [
        [(0, 9, 9), (4, 9, 9), (8, 9, 9), (0, 4, 4)],
        [(0, 5, 5), (4, 5, 5)],
        [(0, 12, 12), (4, 12, 12), (8, 12, 12)],
    ]
