"""The environment of the process, which nothing else reads: `DLX_*` and the threads that OpenMP may take."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

PREFIX = "DLX_"
# variables that stand for no setting, and what they may be; () is anything
OWN: dict[str, tuple[str, ...]] = {"DLX_DEBUG": ("0", "1"), "DLX_CONFIG": ()}


class Environment(NamedTuple):
    """What the library reads; the command line takes every setting from `variables`."""

    threads: int | None  # OMP_NUM_THREADS, where it is a number
    pack: Path | None  # DLX_PACK, what Config.pack is by default
    debug: bool  # DLX_DEBUG=1: kernels check page indices
    config: Path | None  # DLX_CONFIG, the YAML file of a command line without --config


def environment() -> Environment:
    """Read the environment now."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    pack, config = os.environ.get("DLX_PACK"), os.environ.get("DLX_CONFIG")
    return Environment(
        int(threads) if threads.isdigit() and int(threads) > 0 else None,
        Path(pack) if pack else None,
        os.environ.get("DLX_DEBUG") == "1",
        Path(config) if config else None,
    )


def variables() -> dict[str, str]:
    """All `DLX_*` that say something, by name."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIX) and value}


def inherited(*without: str, **more: str) -> dict[str, str]:
    """The environment for a child: without some variables, with others set."""
    return {name: value for name, value in os.environ.items() if name not in without} | more
