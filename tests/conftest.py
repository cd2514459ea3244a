"""One thread, the test models, and which tests run where."""

from __future__ import annotations

import json
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: on a small shared host more threads are slower

from collections.abc import Callable, Iterator
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


@pytest.fixture
def all_to_all(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """Makes of an SDAR checkpoint's folder one of a family that is trained all-to-all, which this test alone knows."""
    from dlx.models import MODELS
    from dlx.models.families import FAMILIES

    name, sdar = "AllToAllForCausalLM", "SDARForCausalLM"
    monkeypatch.setitem(FAMILIES, name, FAMILIES[sdar]._replace(full=True, policy="fast_dllm_v1"))
    monkeypatch.setitem(MODELS, name, MODELS[sdar])

    def turned(folder: Path) -> Path:
        facts = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(facts | {"architectures": [name]}))
        return folder

    return turned
