"""Servers for tests: one over a fake engine, and one over the nano model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.fake import FakeEngine
from tests.serve.served import Served


@pytest.fixture(scope="module")
def shared() -> Iterator[Served]:
    """A server over a fake engine, for a whole file."""
    with Served(FakeEngine()) as served:
        yield served


@pytest.fixture
def fake(shared: Served) -> Iterator[Served]:
    """The server over a fake engine, which forgets what a test told it and is idle after each."""
    engine: FakeEngine = shared.engine
    engine.asked.clear()
    engine.prompts.clear()
    engine.aborted.clear()
    yield shared
    engine.held, engine.failing, engine.ends, engine.slots = False, None, None, 1000
    shared.until(lambda: not engine.open)


@pytest.fixture(scope="package")
def model(nano: Path) -> Iterator[Served]:
    """A server over the nano model on the CPU."""
    from dlx.async_engine import AsyncEngine
    from dlx.config import Config

    engine = AsyncEngine(Config.from_args(nano, graphs="off", device="cpu", max_num_seqs=4))
    with Served(engine, {"nano": None}) as served:
        yield served
