"""Servers for tests: one over a fake engine, and one over the nano model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.fake import ANSWER, FakeEngine
from tests.serve.served import Served


@pytest.fixture(scope="package")
def shared() -> Iterator[Served]:
    """A server over a fake engine, for all of these tests."""
    with Served(FakeEngine()) as served:
        yield served


@pytest.fixture
def fake(shared: Served) -> Iterator[Served]:
    """The server over a fake engine. After each test nothing runs in it, and it answers as before."""
    engine: FakeEngine = shared.engine
    engine.asked.clear()
    engine.prompts.clear()
    engine.aborted.clear()
    yield shared
    engine.held, engine.failing, engine.ends, engine.slots = False, None, None, 1000
    shared.until(lambda: not engine.open)
    alive = shared.client.post("/v1/completions", json={"prompt": "Are you there?"})
    assert (alive.status_code, alive.json()["choices"][0]["text"]) == (200, ANSWER)


@pytest.fixture(scope="package")
def model(nano: Path) -> Iterator[Served]:
    """A server over the nano model on the CPU."""
    from dlx.async_engine import AsyncEngine
    from dlx.config import Config

    engine = AsyncEngine(Config.from_args(nano, graphs="off", device="cpu", max_num_seqs=4))
    with Served(engine, {"nano": None}) as served:
        yield served
