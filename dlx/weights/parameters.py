"""Safetensors checked against the parameters of a network, then copied into them tensor by tensor."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn
from torch import Tensor

from dlx.errors import ModelError
from dlx.models.card import Place
from dlx.weights.files import INDEX, SINGLE, SPARE, Json, Stored, index, listed, opened, read

FLOATS = {"F64", "F32", "F16", "BF16"}  # dtypes as safetensors' headers name them
FP8 = torch.float8_e4m3fn
LAYOUT, FUSED = "dlx_layout", "fused"  # what `dlx convert` adds to config.json
BAR_BYTES = 1 << 30  # less is there before anybody reads a bar


class Delta(NamedTuple):
    """What an adapter adds to some rows of a parameter: scale · b · a."""

    row: int  # the first one, counted over all axes but the last
    a: Tensor  # [r, in]
    b: Tensor  # [out, r]
    scale: float


NONE: Mapping[str, Sequence[Delta]] = MappingProxyType({})
EMPTY: Mapping[str, Place] = MappingProxyType({})


def load(
    folder: str | Path,
    places: Mapping[str, Place],
    params: Mapping[str, Tensor],
    stacked: Mapping[str, Place] = EMPTY,
    *,
    deltas: Mapping[str, Sequence[Delta]] = NONE,
    finite: bool = False,
    progress: bool | None = None,
) -> None:
    """Fill `params` in place from the safetensors of a checkpoint folder.

    Every tensor is checked by the shards' headers before the first one is read; then each is copied from the mapped
    file to its rows, with the parameter's device and dtype.

    places    checkpoint name → where it goes; together they cover every row of every parameter
    params    parameter name → tensor on its device
    stacked   names of tensors that, where they are there, stand for the first rows of their parameter
    deltas    parameter name → what adapters add to its rows, in fp32 before the cast
    finite    refuse NaN and infinities; waits for the device once a tensor
    progress  a bar on stderr; None shows one at a terminal for what takes long
    Work      linear in the number of tensors; a shard is mapped at a time, and given back after it
    Raises ModelError  no weights, pickle weights, a damaged or missing shard; missing, extra, misshapen tensors or
                       ones of another dtype, each named; with `finite` the first tensor that is not
    """
    stored = index(folder)
    places = chosen(places, stacked, stored)
    check(folder, stored, places, params)
    fill(stored, places, params, deltas=deltas, finite=finite, progress=progress)


def chosen(
    places: Mapping[str, Place], stacked: Mapping[str, Place], stored: Mapping[str, Stored]
) -> Mapping[str, Place]:
    """The places in which those of `stacked` that are stored stand for all others of their rows."""
    there = {name: place for name, place in stacked.items() if name in stored}
    taken = {place.param: place.rows for place in there.values()}  # the first rows of each
    return {name: place for name, place in places.items() if place.row >= taken.get(place.param, 0)} | there


def check(
    folder: str | Path, stored: Mapping[str, Stored], places: Mapping[str, Place], params: Mapping[str, Tensor]
) -> None:
    """Raise one ModelError that names every tensor that is missing, extra, misshapen or of a wrong dtype."""
    room = dict.fromkeys(params, 0)
    for place in places.values():
        room[place.param] += math.prod(place.shape)
    assert room == {name: param.numel() for name, param in params.items()}, "places must cover the parameters"
    wrong: list[str] = []
    for name, (path, shape, dtype) in stored.items():
        if name not in places:
            if name not in SPARE:
                wrong.append(f"{name} is extra (in {path.name}; the network has no such tensor)")
            continue
        place = places[name]
        if shape != place.shape:
            wrong.append(f"{name} has shape {list(shape)}, expected {list(place.shape)} (in {path.name})")
        allowed = {"F8_E4M3"} if params[place.param].dtype == FP8 else FLOATS
        if dtype not in allowed:
            wrong.append(f"{name} has dtype {dtype}, expected one of {', '.join(sorted(allowed))} (in {path.name})")
    where = SINGLE if (Path(folder) / SINGLE).is_file() else f"the shards of {INDEX}"
    wrong += [
        f"{name} is missing (shape {list(place.shape)}; not in {where})"
        for name, place in places.items()
        if name not in stored
    ]
    if wrong:
        raise ModelError(
            f"the tensors of {folder} are not those of its config.json: {listed(wrong, '; ')}. "
            "Check that config.json and weights are of the same checkpoint"
        )


def fill(
    stored: Mapping[str, Stored],
    places: Mapping[str, Place],
    params: Mapping[str, Tensor],
    *,
    deltas: Mapping[str, Sequence[Delta]] = NONE,
    finite: bool = False,
    progress: bool | None = None,
) -> None:
    """Copy the tensors of `places`, which were checked, into their rows of `params`; see `load`."""
    shards: dict[Path, list[str]] = {}
    for name in places:
        shards.setdefault(stored[name].path, []).append(name)
    total = sum(path.stat().st_size for path in shards)
    shown = total >= BAR_BYTES and sys.stderr.isatty() if progress is None else progress
    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with (
        Progress(*columns, console=Console(stderr=True), transient=progress is None, disable=not shown) as bar,
        torch.no_grad(),
    ):
        task = bar.add_task("weights", total=total)
        for path, names in shards.items():
            with opened(path) as shard:  # one at a time: what is mapped counts as this process's memory
                for name in names:
                    place = places[name]
                    value = read(path, shard, name)
                    target = rows(params[place.param], place)
                    bar.advance(task, value.nbytes)
                    if place.param in deltas:
                        value = merged(value.to(target.device), place.row, deltas[place.param])
                    target.copy_(value)
                    if finite and not bool(target.float().isfinite().all()):
                        raise ModelError(
                            f"{path}: {name} holds NaN or infinite values (as {target.dtype}); fetch the file again"
                        )


def rows(param: Tensor, place: Place) -> Tensor:
    """The rows of a parameter that a checkpoint tensor fills, in the tensor's own shape."""
    return param.view(-1, *place.shape[1:]).narrow(0, place.row, place.shape[0])


def merged(value: Tensor, row: int, deltas: Sequence[Delta]) -> Tensor:
    """A copy of `value`, which holds a parameter's rows from `row` on, in fp32, with what falls on them added."""
    out = value.to(torch.float32, copy=True).view(-1, value.shape[-1])
    for first, a, b, scale in deltas:
        if 0 <= first - row < len(out):
            part = out.narrow(0, first - row, b.shape[0])
            part.addmm_(b.to(out.device, torch.float32), a.to(out.device, torch.float32), alpha=scale)
    return out.view_as(value)


def layout(config: Json, places: Mapping[str, Place], params: Mapping[str, Tensor]) -> Mapping[str, Place]:
    """Where a checkpoint's tensors go: as its family says, or, if `dlx convert` wrote it, each to its namesake."""
    if config.get(LAYOUT) != FUSED:
        return places
    return {name: Place(name, 0, tuple(param.shape)) for name, param in params.items()}


def release(params: Mapping[str, Tensor]) -> None:
    """Give the memory of half-filled parameters back, whoever still holds them: an error's traceback does."""
    for param in params.values():
        param.untyped_storage().resize_(0)


def random(params: Mapping[str, Tensor], seed: int) -> None:
    """Fill `params` in place for benchmarks: matrices from N(0, 0.02²), vectors with ones, but biases with zeros."""
    draws: dict[torch.device, torch.Generator] = {}
    with torch.no_grad():
        for name in sorted(params):
            param = params[name]
            if param.ndim == 1:
                param.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            if param.device not in draws:
                draws[param.device] = torch.Generator(param.device).manual_seed(seed)
            param.normal_(0.0, 0.02, generator=draws[param.device])
