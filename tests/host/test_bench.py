"""The benchmark's scene decodes at the schedule that it is told, and its floor counts what a forward must read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dlx.bench import Scene, decode, floor_bytes, stand
from dlx.errors import ConfigError


@pytest.mark.parametrize(("accept", "each"), [(4, 4.0), (1, 1.0), (24, 16.0)])
def test_every_row_commits_what_is_accepted(nano: Path, accept: int, each: float) -> None:
    scene = Scene(nano, block=16, context=48, requests=3, accept=accept)
    worker = scene.worker("off", max_new=1200)
    with torch.no_grad():
        tokens, nfe, wall_s = decode(worker, stand(worker, scene), steps=32)
    assert nfe == 3 * 32
    assert tokens / nfe == each
    assert wall_s > 0


def test_the_floor_is_the_weights_once_without_an_input_table_of_their_own(nano: Path) -> None:
    scene = Scene(nano, block=16, context=48, requests=2, accept=4)
    worker = scene.worker("off", max_new=64)
    need = floor_bytes(worker, scene)
    weights = sum(p.numel() for p in worker.net.parameters())
    assert need["weights"] == 4 * weights  # tied: the table is the head, and read
    assert need["kv"] == 2 * 48 * 3 * 2 * 1 * 32 * 4  # requests · context · layers · (k, v) · G · D · bytes


def test_a_shape_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        Scene(Path("nowhere"), 4, 64, 1, 4).worker("off", 64)
