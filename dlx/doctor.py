"""What this machine offers to dlx: versions, devices, compilers, the graphs it would make, its faster threads."""

from __future__ import annotations

import contextlib
import logging
import shutil
import subprocess
import sys
import timeit
from dataclasses import asdict
from typing import Any

import dlx
from dlx.environment import environment
from dlx.errors import CapacityError, ModelError

log = logging.getLogger(__name__)

COMPILERS = {"c compiler": ("cc", "gcc", "clang"), "c++ compiler": ("c++", "g++", "clang++")}
OLDEST = (8, 0)  # compute capability with bfloat16 and what the kernels' copies need
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


def settle(device: str | None) -> None:
    """Make sure that the device is there and new enough; on a CPU choose torch's threads.

    Raises CapacityError  with the versions that matter
    """
    import torch

    there = torch.cuda.is_available()
    if device is not None and device.startswith("cuda"):
        index = int(device.partition(":")[2] or 0)
        has = f"torch {torch.__version__}, its CUDA {torch.version.cuda}, driver {driver()}"
        if not there:
            raise CapacityError(
                f"device={device!r}: torch sees no such device ({has}); use --device cpu, see dlx doctor"
            )
        if index >= torch.cuda.device_count():
            raise CapacityError(f"device={device!r} is not among the {torch.cuda.device_count()} there are ({has})")
    if there and device != "cpu":
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < OLDEST:
            least = f"sm_{OLDEST[0]}{OLDEST[1]}"
            raise CapacityError(f"{device or 'cuda'} is sm_{major}{minor}; dlx needs {least} or newer, or --device cpu")
    else:
        choose_threads()


def choose_threads() -> None:
    """Give torch the faster of one thread and all it would take, unless OMP_NUM_THREADS is set."""
    import torch

    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        return timeit.repeat(lambda: torch.relu(x @ w), repeat=2, number=50)[1]  # [0] starts them

    x, w = torch.ones(32, 384), torch.ones(384, 1152)  # as small as a decode step's
    most = torch.get_num_threads()
    if most > 1 and environment().threads is None:
        torch.set_num_threads(min((1, most), key=seconds))  # on a shared host all may be far slower
        log.debug("torch takes %d of %d threads", torch.get_num_threads(), most)
