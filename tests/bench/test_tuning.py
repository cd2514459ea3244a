"""Launch configurations searched in the very step: what is timed is a step that decodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from dlx.bench import Scene, tuning
from dlx.bench.scene import Stand
from dlx.ops.bench.chain import Took
from dlx.ops.bench.search import Ask


class Launch(NamedTuple):
    warps: int


def graph(call: Callable[[int], object], copies: int, n: int) -> SimpleNamespace:
    """As `captured`, run anew by each replay."""
    return SimpleNamespace(replay=lambda: [call(i % copies) for i in range(n)])


def test_rows_decode_until_the_last_comparison_has_ended(nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stands: list[Stand] = []
    ended: list[bool] = []

    def asks(at: Stand, _: object) -> dict[Any, Any]:
        stands.append(at)
        return {
            ("op", (n,)): (Ask("op", (n,), Launch(4), lambda _: True), lambda: torch.ones(1), n == 2) for n in (1, 2)
        }

    def turns(graphs: Mapping[str, Any], n: int, rounds: int) -> dict[str, Took]:
        for each in (*graphs.values(),) * (1 + rounds):
            each.replay()
        ended.append(bool(stands[0].worker.buf.done.all()))
        return {name: Took(1.0, 1.0, 1.0) for name in graphs}

    for name, double in (("asks", asks), ("captured", graph), ("turns", turns)):
        monkeypatch.setattr(tuning, name, double)
    found = [*tuning.searched(Scene(nano, 4, 16, 1, 4), ["op"], set(), time.monotonic())]
    assert [config for _, config, _, _ in found] == [Launch(4)] * 2
    assert len(ended) >= 4 and not any(ended)
