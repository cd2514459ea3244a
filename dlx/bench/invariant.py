"""Whether requests get the tokens alone that they get in a batch, and what it costs that they do.

Each request is served alone, then all arrive together, then again the other way round; with `batch_invariant` and
without, where what differs shows that the comparison can see a difference.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dlx.bench.clock import there, wait
from dlx.bench.scene import How, Scene, prompts
from dlx.provenance import provenance
from dlx.request import SamplingParams

if TYPE_CHECKING:
    from dlx.engine import Engine

SCHEMA = 1
Asked = tuple[list[int], SamplingParams]
Answer = tuple[list[int], int]  # tokens, forwards


def invariance(scene: Scene, how: How, n: int, max_tokens: int, command: str) -> dict[str, Any]:
    """One record: of n requests, how many got the same tokens and forwards alone and in batches of `scene.requests`.

    Prompts have 1 to `scene.context` tokens, answers 1 to `max_tokens`.
    """
    rng = random.Random(0)
    asked: list[Asked] = []
    for prompt in prompts(scene.card(), n, scene.context):
        params = SamplingParams(max_tokens=rng.randint(1, max_tokens), ignore_eos=True)
        asked.append((prompt[: rng.randint(1, scene.context)], params))
    runs = {}
    for name, kept in (("invariant", True), ("plain", False)):
        engine = scene.engine(how._replace(batch_invariant=kept), scene.context + max_tokens, scene.requests)
        with there(engine.worker.device):
            runs[name] = compared(engine, asked)
        device = engine.worker.config.device
        engine.worker.release()
        del engine
        gc.collect()  # graphs and what they run hold each other
    return {
        "schema": SCHEMA,
        "what": "invariance",
        "scene": scene.describe() | {"max_tokens": max_tokens},
        "n": n,
        **runs,
        "cost": {key: runs["invariant"][key] / runs["plain"][key] for key in ("alone_s", "together_s")},
        "made": provenance(command, device),
    }


def compared(engine: Engine, asked: Sequence[Asked]) -> dict[str, Any]:
    """How many answers are the same, and the seconds that they took; graphs are made before."""
    answers(engine, asked)
    answers(engine, asked[:1])
    alone_s, alone = clocked(engine, [[one] for one in asked])
    together_s, together = clocked(engine, [asked])
    _, turned = clocked(engine, [asked[::-1]])
    pairs = zip(alone, together, turned[::-1], strict=True)
    return {
        "same": sum(a == b == c for a, b, c in pairs),
        "rows": list(engine.worker.shapes.rows),
        "prefill_tokens": list(engine.worker.shapes.tokens),
        "alone_s": alone_s,
        "together_s": together_s,
    }


def clocked(engine: Engine, groups: Sequence[Sequence[Asked]]) -> tuple[float, list[Answer]]:
    """Seconds, and the answers of groups that are served one after the other."""
    wait(engine.worker.device)
    began = time.monotonic()
    out = [answer for group in groups for answer in answers(engine, group)]
    return time.monotonic() - began, out


def answers(engine: Engine, asked: Sequence[Asked]) -> list[Answer]:
    """Of requests that arrive together, in their order."""
    engine.add_all([(list(prompt), params) for prompt, params in asked])
    requests = list(engine.scheduler.waiting)
    while not engine.idle:
        engine.step()
    return [(r.out, r.nfe) for r in requests]
