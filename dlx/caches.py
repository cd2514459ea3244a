"""Where the compilers keep what they made: Inductor's cache and Triton's, as files that may move to another process."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from triton import knobs
from triton.runtime.jit import JITFunction

Files = dict[str, bytes]  # by their names in a pack
GRAPHS, TRITON, INDUCTOR = "graphs.bin", "triton", "inductor"
GROUP = "__grp__"  # a file of a Triton entry that names the others by their full paths


@contextmanager
def empty(folder: Path) -> Iterator[None]:
    """Inductor and Triton find and leave nothing but what is below `folder`."""
    from torch._inductor.utils import fresh_cache

    with fresh_cache(dir=str(folder), delete=False):
        yield


def kernels() -> list[JITFunction[Any]]:
    """The Triton kernels of the modules of dlx that are imported."""
    modules = [(name, module) for name, module in sys.modules.items() if name.startswith("dlx.")]
    values = [(name, value) for name, module in modules for value in vars(module).values()]
    return [value for name, value in values if isinstance(value, JITFunction) and value.__module__ == name]


def collected(folder: Path, artefacts: bool = True) -> Files:
    """What was compiled in `empty(folder)`, as another process can use it: without a path of this one.

    artefacts  with Inductor's, which leave out Triton's entries and what is built for a CPU
    """
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        match path.relative_to(folder).parts:
            case (_, "triton", entry, name) if path.suffix != ".lock":
                files[f"{TRITON}/{entry}/{name}"] = (
                    moved(path.read_bytes(), None) if name.startswith(GROUP) else path.read_bytes()
                )
            case (_, shelf, name) if path.suffix == ".so":
                files[f"{INDUCTOR}/{shelf}/{name}"] = path.read_bytes()
    if artefacts:
        saved = torch.compiler.save_cache_artifacts()
        assert saved is not None, "nothing was compiled"
        files[GRAPHS] = saved[0]
    return files


def fill(files: Mapping[str, bytes], device: torch.device) -> None:
    """Put files where the compilers look for them; what is there already stays.

    Raises OSError or ValueError
    """
    places, shelves = {Path(knobs.cache.dir)}, None
    if GRAPHS in files:
        from torch._inductor.runtime.cache_dir_utils import cache_dir, triton_cache_dir  # seconds: they import Dynamo

        # until its first own kernel Inductor leaves Triton's cache where it was, so that both places are asked
        places.add(Path(triton_cache_dir(device.index or 0)))
        shelves = Path(cache_dir())
    for name, data in sorted(
        files.items(), key=lambda item: GROUP in item[0]
    ):  # Triton asks for a group: it comes last
        kind, *rest = PurePosixPath(name).parts
        if kind == TRITON:
            for path in (place.joinpath(*rest) for place in places):
                write(path, moved(data, path.parent) if path.name.startswith(GROUP) else data)
        elif kind == INDUCTOR and shelves is not None:
            write(shelves.joinpath(*rest), data)
    if GRAPHS in files and torch.compiler.load_cache_artifacts(files[GRAPHS]) is None:
        raise ValueError(f"{GRAPHS} cannot be loaded")


def moved(group: bytes, folder: Path | None) -> bytes:
    """A group file whose entry lies in `folder`; None leaves the names alone."""
    value = json.loads(group)
    children = value.get("child_paths") if isinstance(value, dict) else None
    if not isinstance(children, dict):
        raise ValueError("an entry of Triton's cache is of an unknown form")
    names = {child: Path(path).name for child, path in children.items()}
    value["child_paths"] = {child: str(folder / name) if folder else name for child, name in names.items()}
    return json.dumps(value).encode()


def write(path: Path, data: bytes) -> None:
    """A file that appears whole, or not at all; one that is there stays."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    os.chmod(part, 0o755 if path.suffix == ".so" else 0o644)
    os.replace(part, path)
