"""The forward of fewer places: the same where no block only commits, and run there and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from dlx.config import Config
from dlx.graphs.either import Either, commits
from dlx.graphs.policies import POLICIES
from dlx.graphs.step import Ids, denoise
from dlx.worker import Worker
from tests.checkpoints import Shape, write
from tests.graphs import test_step
from tests.graphs.test_step import MASK, Table, V, begin

L = 8  # as some rules want it
WINDOWED = [name for name, p in POLICIES.items() if p.turn is None and p.canvas is None]


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("name", WINDOWED)
def test_where_no_block_only_commits_fewer_places_give_the_same(
    name: str, shift: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_step, "L", L)
    rng, policy = Random(name), replace(POLICIES[name], L=L)
    net = Table([rng.randrange(1, V - 2) for _ in range(64)], [rng.uniform(2, 9) for _ in range(64)])
    asked = [{"prompt": p, "max_tokens": 30 + p, "accept": 0.7, "max_nfe": 60} for p in (3, 8, 5)]
    buf, kv, _ = begin(policy, asked)
    if shift:
        buf = buf._replace(last=torch.zeros(3, V))
    wide = narrow = 0
    while not buf.done.all():
        pages = tuple(t.clone() for t in kv)
        new, out = denoise(policy, Ids(MASK, V, shift), net, buf, kv)
        assert net.views[-1].pos.shape[1] == (policy.N + 1) * L
        if commits(buf.whole, buf.done):
            wide += 1
        else:
            narrow += 1
            few, few_out = denoise(policy, Ids(MASK, V, shift), net, buf, pages, commits=False)
            assert net.views[-1].pos.shape[1] == policy.N * L
            pairs = [*zip(new[:-1], few[:-1], strict=True), *((t, few.mem[k]) for k, t in new.mem.items())]
            for a, b in (*pairs, *zip(out, few_out, strict=True), *zip(kv, pages, strict=True)):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        buf = new
    assert wide >= 2 and narrow >= 2


def test_a_block_that_only_commits_is_one_of_a_running_row_and_leads() -> None:
    whole, done = torch.zeros(2, 2, dtype=torch.bool), torch.tensor([False, True])
    assert not commits(whole, done)
    whole[0, 1] = whole[1, 0] = True  # it waits for the one before; its row has ended
    assert not commits(whole, done)
    whole[0, 0] = True
    assert commits(whole, done)


@pytest.mark.parametrize(("block", "invariant", "both"), [(8, False, False), (16, False, True), (16, True, False)])
def test_long_blocks_have_both_forwards_unless_rows_are_to_be_strangers(
    block: int, invariant: bool, both: bool, tmp_path: Path
) -> None:
    shape = Shape(block, heads=2, kv_heads=1, head_dim=16, layers=1, hidden=32, ffn=48)
    config = Config.from_args(
        write(tmp_path / "model", shape, 1), "single_bd", "off", device="cpu", max_num_seqs=1, batch_invariant=invariant
    )
    worker = Worker(config)
    assert isinstance(worker._step(worker.sent, 0, 0)[0], Either) == both
