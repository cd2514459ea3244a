"""Where a measured record comes from, and where it belongs."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch
import triton


def provenance(command: str, device: str) -> dict[str, str | None]:
    """Where a record comes from: commit (None outside a checkout), versions, date, command, machine."""
    on_gpu = device.split(":")[0] == "cuda"
    root = Path(__file__).parents[1]
    commit = None
    if (root / ".git").exists() and shutil.which("git"):
        git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    return {
        "commit": commit,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": command,
        "machine": torch.cuda.get_device_name(device) if on_gpu else f"cpu, {platform.machine()}",
    }


def place(folder: Path, model: str, policy: str, made: Mapping[str, str | None]) -> Path:
    """Where a record belongs under profiles/runs: <gpu or cpu>/<model>--<policy>.json."""
    return folder / slug(made["machine"] or "") / f"{model}--{policy}.json"


def slug(machine: str) -> str:
    """The name of a machine's folder, without what follows a comma: "NVIDIA H100 80GB HBM3" → nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", machine.split(",")[0].lower()).strip("-")
