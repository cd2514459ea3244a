"""Recorded launch configurations: what `dlx tune` found to be fastest on this GPU.

    profiles/kernels/<gpu>/<op>.json   {"schema": 1, "op": …, "gpu": …, "default": {…} or null,
                                        "configs": [{"key": [rows, …], "config": {field: value}, …}], "made": {…}}

A look-up takes the exact key, else the nearest first number (rows) with the rest of the key equal: any smaller one, or
twice as much at most; else a file's default, else the code's; of two files, this GPU's before that of a GPU of the
same processor. What a file holds may only make a kernel faster or slower: no field of a configuration changes a result
beyond the order in which the parts of a reduction are added. So a file that cannot be read, is of another GPU, op or
schema, or holds an impossible entry is told of once, and passed over.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch

from dlx.provenance import slug

log = logging.getLogger(__name__)

SCHEMA = 1
MOST_WARPS = 32
KIN = {"nvidia-h200": "nvidia-h100-80gb-hbm3"}  # the same processor, other memory: serves until it has its own
L = TypeVar("L", bound=tuple)  # a NamedTuple of ints and bools


class Records(NamedTuple):
    """What a file holds of use: configurations by the rest of their key, then by rows; and what is wrong with it."""

    configs: dict[tuple[int, ...], dict[int, Any]]
    default: Any
    fault: str


EMPTY = Records({}, None, "")


def tuned(op: str, key: tuple[int, ...], default: L, fits: Callable[[L], bool] = lambda config: True) -> L:
    """The recorded configuration for this key on the current GPU; `default` without a GPU, or if there is none.

    key   rows first, then the numbers that a record must match exactly
    fits  whether a configuration can run there (shared memory, say); one that cannot is passed over
    """
    return found(op, key, default, fits)


def found(op: str, key: tuple[int, ...], default: L, fits: Callable[[L], bool]) -> L:
    """What `tuned` returns; the search stands in here while it tries configurations."""
    if not torch.cuda.is_available():
        return default
    gpu = slug(torch.cuda.get_device_name())
    names = [name for name in (gpu, KIN.get(gpu)) if name]
    paths = [folder() / name / f"{op}.json" for name in names]
    files = [read(*file, op, type(default), tuple(map(type, default))) for file in zip(paths, names, strict=True)]
    some = [
        (rows, path, config)
        for path, records in zip(paths, files, strict=True)
        for rows, config in records.configs.get(key[1:], {}).items()
        if rows <= 2 * key[0]
    ]
    for rows, path, config in sorted(some, key=lambda each: (max(each[0] / key[0], key[0] / each[0]), each[0])):
        if fits(config):
            return config
        if rows == key[0]:  # one for other rows need not suit these
            tell(path)(f"its configuration for {(rows, *key[1:])} does not fit this GPU")
    for path, records in zip(paths, files, strict=True):
        if records.default is not None:
            if fits(records.default):
                return records.default
            tell(path)("its default does not fit this GPU")
    return default


def folder(package: Path = Path(__file__).parents[1]) -> Path:
    """profiles/kernels as the wheel ships it inside the package, or beside the package in a checkout."""
    inside = package / "profiles" / "kernels"
    return inside if inside.is_dir() else package.parent / "profiles" / "kernels"


@cache
def tell(path: Path) -> Callable[[str], None]:
    """Warns of a file once, however much of it is wrong."""
    once = iter((log.warning,))

    def warn(fault: str) -> None:
        for say in once:
            say("recorded launch configurations in %s are passed over: %s", path, fault)

    return warn


@cache
def read(path: Path, gpu: str, op: str, kind: type[tuple], types: tuple[type, ...]) -> Records:
    """The file's usable entries as `kind`, whose fields have these types; read once."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return EMPTY
    except (OSError, ValueError) as error:
        records = EMPTY._replace(fault=f"it cannot be read ({error})")
    else:
        records = usable(value, gpu, op, kind, types)
    if records.fault:
        tell(path)(records.fault)
    return records


def usable(value: object, gpu: str, op: str, kind: type[tuple], types: tuple[type, ...]) -> Records:
    """The entries of a file's value that can be launched; `fault` names the first thing that is wrong."""
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        return EMPTY._replace(fault=f"it is not of schema {SCHEMA}")
    if value.get("op") != op:
        return EMPTY._replace(fault=f"it is of the op {value.get('op')!r}, not {op!r}")
    if slug(str(value.get("gpu"))) != gpu:
        return EMPTY._replace(fault=f"it is of the GPU {value.get('gpu')!r}, this is {gpu!r}")
    entries = value.get("configs")
    if not isinstance(entries, list):
        return EMPTY._replace(fault="its configs are no list")
    faults: list[str] = []
    configs: dict[tuple[int, ...], dict[int, Any]] = {}
    for entry in entries:
        key = entry.get("key") if isinstance(entry, dict) else None
        if not isinstance(key, list) or not key or any(type(n) is not int or n < 0 for n in key) or not key[0]:
            faults.append(f"{key!r} is no key")
            continue
        fault = impossible(entry.get("config"), kind, types)
        if fault:
            faults.append(f"the configuration for {key} {fault}")
        else:
            configs.setdefault(tuple(key[1:]), {})[key[0]] = kind(**entry["config"])
    default, fault = value.get("default"), ""
    if default is not None:
        fault = impossible(default, kind, types)
        faults += [f"its default {fault}"] if fault else []
    return Records(configs, None if default is None or fault else kind(**default), faults[0] if faults else "")


def impossible(config: object, kind: type[tuple], types: tuple[type, ...]) -> str:
    """Why a recorded configuration cannot be launched; empty if it can. Fields in capitals are tiles."""
    fields = cast(Any, kind)._fields
    if not isinstance(config, dict) or set(config) != set(fields):
        return f"has not the fields {', '.join(fields)}"
    for name, wanted in zip(fields, types, strict=True):
        n = config[name]
        if type(n) is not wanted:
            return f"has {name} = {n!r}, which is no {wanted.__name__}"
        if type(n) is int and n < 1:
            return f"has {name} = {n}; it is 1 or above"
        if (name.isupper() or name == "warps") and n & (n - 1):
            return f"has {name} = {n}; it is a power of two"
        if name == "warps" and n > MOST_WARPS:
            return f"has {name} = {n}; it is {MOST_WARPS} at most"
    return ""
