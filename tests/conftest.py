"""One thread, the test models, and which tests run where."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: on a small shared host more threads are slower

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from dlx import LLM

ROOT = Path(__file__).parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave `interp` tests to a run with TRITON_INTERPRET=1 and all others out of it; skip without GPUs.

    Triton decides at import whether it interprets, so one process runs one kind.
    """
    other = [item for item in items if ("interp" in item.keywords) != INTERPRETED]
    if other:
        config.hook.pytest_deselected(items=other)
        items[:] = [item for item in items if ("interp" in item.keywords) == INTERPRETED]
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        need = 2 if "multi_gpu" in item.keywords else 1 if "gpu" in item.keywords else 0
        if gpus < need:
            item.add_marker(pytest.mark.skip(reason=f"needs {need} GPU, this machine has {gpus}"))


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The folder of the bundled checkpoint."""
    return ROOT / "dlx" / "assets" / "tiny"


@pytest.fixture(scope="session")
def nano() -> Path:
    """The folder of the 0.33 M parameter checkpoint."""
    return ROOT / "tests" / "data" / "nano"


@pytest.fixture(scope="session")
def llm(tiny: Path) -> Iterator[LLM]:
    """The bundled model, eager, fp32, on the CPU, single_bd."""
    from dlx import LLM

    with LLM(tiny, graphs="off", device="cpu", dtype="float32") as llm:
        yield llm


@pytest.fixture(scope="session")
def nano_llm(nano: Path) -> Iterator[LLM]:
    """The nano model, eager, fp32, on the CPU, single_bd."""
    from dlx import LLM

    with LLM(nano, graphs="off", device="cpu", dtype="float32") as llm:
        yield llm
