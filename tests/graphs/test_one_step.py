"""DMax at its own cap of forwards, on a random model, a forward at a time.

There its re-predictions wander for as long as they may, and rounding grows with them, so that two exact decoders part
after some forwards (on the bundled model they do not: tests/models/test_bundled.py). So the loop in plain Python takes
the state, ids and mixed embeddings, from dlx before each forward, and must say what the forward makes of it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dlx import LLM, SamplingParams
from dlx.graphs.buffer import BlockBuffer
from dlx.graphs.policies import POLICIES
from dlx.graphs.rules import Calm
from tests.checkpoints import ZOO, write
from tests.graphs.test_strategies import prompts
from tests.reference import Qwen3
from tests.strategies import Block, merged, probabilities, smoothed

L = ZOO["b8"].block_length
NEAR = 1e-4  # confidences this near to each other or to a bar may fall either way


def merge(E: Tensor, tok: int, ids: Tensor, shares: Tensor) -> Tensor:
    e = shares @ E[ids]
    return e * (shares @ E[ids].norm(dim=-1)) / e.norm()


def smooth(E: Tensor, tok: int, ids: Tensor, shares: Tensor) -> Tensor:
    return E[tok] + shares @ E[ids]


LOOPS = {"dmax": (merged, merge), "token_merge": (smoothed, smooth)}


def near(b: Block) -> bool:
    first, second = b.p.topk(2, -1).values.T
    return any(bool((gap.abs() < NEAR).any()) for gap in (first - second, first - b.accept, first - 0.9))


def place_of(buf: BlockBuffer, at: int) -> int:
    """Where the block that begins at a position stands in the window."""
    return (at - int(buf.start[0])) // L


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_every_forward_is_the_loops_from_the_same_state(name: str, tmp_path: Path) -> None:
    assert POLICIES[name].settle == Calm(limit=16, sure=0.9)
    net, (loop, mixed_of) = Qwen3(write(tmp_path, ZOO["b8"], 3), L), LOOPS[name]
    E, rng = net.net.get_input_embeddings().weight.detach(), torch.Generator()
    forwards = excused = capped = mixed = 0
    with LLM(tmp_path, policy=name, graphs="off", device="cpu", dtype="float32", max_num_seqs=1) as llm:
        buf = llm.engine.worker.buf
        for i, prompt in enumerate(prompts(9, 6)):
            bar = torch.tensor((0.35, 0.6, 0.85)[i % 3]).item()
            at = len(prompt) // L * L
            done, given = prompt[:at], len(prompt) - at
            b = Block(prompt[at:] + [net.mask_id] * (L - given), given, net.mask_id, 0, bar)
            for _ in llm.stream(prompt, SamplingParams(max_tokens=24, threshold=bar, ignore_eos=True), watch=True):
                b.p = probabilities(net, done, b, E, rng, 0)
                excusable, over, place = near(b), loop(b, E), place_of(buf, at)
                ids, whole = buf.tok[0, place].tolist(), bool(buf.whole[0, place])
                if (ids, whole) != (b.ids, over):
                    assert excusable, (name, i, at, ids, b.ids, whole, over)
                    excused += 1
                forwards, capped = forwards + 1, capped + int(over and b.edits >= 16)
                if whole:
                    at, done, given = at + L, done + ids, 0
                    b = Block([net.mask_id] * L, 0, net.mask_id, 0, bar)
                    continue
                b = Block(ids, given, net.mask_id, 0, bar, edits=int(buf.mem["edits"][0, place]))
                for j in range(L):
                    mix, shares = buf.mem["soft"][0, place, j].unbind()
                    if shares.sum() > 0:
                        b.soft[j] = mixed_of(E, ids[j], mix.long(), shares)
                        mixed += 1
    assert forwards > 150 and mixed > 150
    assert name != "dmax" or capped > 3  # smoothed blocks end before their cap
    assert excused <= forwards / 50, (excused, forwards)
