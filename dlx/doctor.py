"""What this machine offers to dlx: versions, devices, compilers, and the graphs it would make."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import dlx
from dlx.errors import ModelError

COMPILERS = {"c compiler": ("cc", "gcc", "clang"), "c++ compiler": ("c++", "g++", "clang++")}
NO_TORCH, NO_MODEL = 1, 3  # exit codes of the command line


def examine() -> tuple[dict[str, Any], int]:
    """What this machine offers, and an exit code: 0 usable, 1 torch does not import, 3 no bundled model."""
    report: dict[str, Any] = {"python": sys.version.split()[0], "dlx": dlx.__version__}
    report |= {name: installed(name) for name in ("torch", "triton", "transformers")}
    report |= {kind: next(filter(None, map(shutil.which, names)), None) for kind, names in COMPILERS.items()}
    try:
        import torch
    except (ImportError, OSError) as error:
        return report | {"problem": f"torch does not import: {error}"}, NO_TORCH
    report |= {"cuda": torch.version.cuda, "driver": driver(), "cpu threads": torch.get_num_threads()}
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        report[f"gpu {i}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, sm_{gpu.major}{gpu.minor}"

    from dlx.config import TINY
    from dlx.graphs.policies import POLICIES
    from dlx.graphs.shapes import plan
    from dlx.models.card import Card
    from dlx.weights import read_config

    try:
        card = Card.from_hf(*read_config(TINY))
    except ModelError as error:
        return report | {"problem": str(error)}, NO_MODEL
    L = card.blocks[0]
    shapes = plan(slots=8, max_len=card.max_len, L=L, S=max(L, 16))
    report |= {"bundled model": str(TINY), "card": asdict(card)}
    for name, policy in POLICIES.items():
        window = {"step rows": shapes.rows, "places": policy.N + 1, "tokens a place": L}
        report[f"graphs of {name}"] = window | {"prefill tokens": shapes.tokens}
    return report, 0


def installed(name: str) -> str | None:
    """The version of an installed distribution, without importing it."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def driver() -> str | None:
    """The version of the NVIDIA driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.split("\n")[0].strip() or None
    return None
