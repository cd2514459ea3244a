"""Safetensors checked against the parameters of a network, then copied into them tensor by tensor."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn
from torch import Tensor

from dlx.errors import ModelError
from dlx.models.card import Place
from dlx.terminal import stderr
from dlx.weights.files import INDEX, SINGLE, SPARE, Json, Stored, index, listed, opened, read
from dlx.weights.fp8 import FP8, quantised, scale_of

FLOATS = {"F64", "F32", "F16", "BF16"}  # dtypes as safetensors' headers name them
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
    skipped: tuple[str, ...] = (),
    *,
    deltas: Mapping[str, Sequence[Delta]] = NONE,
    finite: bool = False,
    progress: bool | None = None,
) -> None:
    """Fill `params` in place from the safetensors of a checkpoint folder.

    Every tensor is checked by the shards' headers before the first one is read; then each is copied from the mapped
    file to its rows, with the parameter's device and dtype.

    places    checkpoint name → where it goes; together they cover every row of every parameter
    params    parameter name → tensor on its device; what goes into one in fp8 and is not, is quantised on the way
    stacked   names of tensors that, where they are there, stand for the first rows of their parameter
    skipped   how the names of tensors begin that are not loaded
    deltas    parameter name → what adapters add to its rows, in fp32 before the cast
    finite    refuse NaN and infinities; waits for the device once a tensor
    progress  a bar on stderr; None shows one at a terminal for what takes long
    Work      linear in the number of tensors; a shard is mapped at a time, and given back after it
    Raises ModelError  no weights, pickle weights, a damaged or missing shard; missing, extra, misshapen tensors or
                       ones of another dtype, each named; with `finite` the first tensor that is not
    """
    stored = index(folder)
    places = chosen(places, stacked, stored)
    check(folder, stored, places, params, skipped)
    fill(stored, places, params, deltas=deltas, finite=finite, progress=progress)


def chosen(
    places: Mapping[str, Place], stacked: Mapping[str, Place], stored: Mapping[str, Stored]
) -> Mapping[str, Place]:
    """The places in which those of `stacked` that are stored stand for all others of their parameters' first rows.

    Raises ModelError  for some that stand for too little together, or for the same rows
    """
    there = {name: place for name, place in stacked.items() if name in stored}
    ends: dict[str, int] = {}
    for place in there.values():
        ends[place.param] = max(ends.get(place.param, 0), place.row + place.rows)
    out = {name: place for name, place in places.items() if place.row >= ends.get(place.param, 0)} | there
    need, given = filled(places), filled(out)
    param = next((param for param in need if need[param] != given[param]), None)
    if param is not None:
        name = next(name for name, place in there.items() if place.param == param)
        raise ModelError(
            f"{stored[name].path.parent}: {name} and its like fill {given[param]} of the {need[param]} elements of "
            f"{param}; some are missing or twice there: fetch the checkpoint again"
        )
    return out


def filled(places: Mapping[str, Place]) -> dict[str, int]:
    """Parameter → elements that places fill."""
    room = dict.fromkeys((place.param for place in places.values()), 0)
    for place in places.values():
        room[place.param] += math.prod(place.shape)
    return room


def check(
    folder: str | Path,
    stored: Mapping[str, Stored],
    places: Mapping[str, Place],
    params: Mapping[str, Tensor],
    skipped: tuple[str, ...] = (),
) -> None:
    """Raise one ModelError that names every tensor that is missing, extra, misshapen or of a wrong dtype."""
    room = filled(places)
    made = {scale_of(name) for name, param in params.items() if param.dtype == FP8}  # while weights are quantised
    sizes = {name: param.numel() for name, param in params.items() if name in room or name not in made}
    assert room == sizes, "places must cover the parameters"
    wrong: list[str] = []
    for name, (path, shape, dtype) in stored.items():
        if name not in places:
            if name not in SPARE and not name.startswith(skipped):
                wrong.append(f"{name} is extra (in {path.name}; the network has no such tensor)")
            continue
        place = places[name]
        if shape != place.shape:
            wrong.append(f"{name} has shape {list(shape)}, expected {list(place.shape)} (in {path.name})")
        given = params[place.param].dtype == FP8 and scale_of(place.param) in room  # else it is quantised here
        allowed = {"F8_E4M3"} if given else FLOATS
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
        Progress(*columns, console=stderr(), transient=progress is None, disable=not shown) as bar,
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
                    if target.dtype == FP8 != value.dtype:
                        value, scale = quantised(value.to(target.device))
                        params[scale_of(place.param)].view(-1).narrow(0, place.row, scale.numel()).copy_(scale.view(-1))
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
    made = {scale_of(name) for name, param in params.items() if param.dtype == FP8}
    made = made if config.get("quantization_config") is None else set()  # quantised here, not read
    return {name: Place(name, 0, tuple(param.shape)) for name, param in params.items() if name not in made}


def random(params: Mapping[str, Tensor], seed: int) -> None:
    """Fill `params` in place for benchmarks: matrices from N(0, 0.02²), vectors with ones, but biases with zeros."""
    draws: dict[torch.device, torch.Generator] = {}
    with torch.no_grad():
        for name in sorted(params, key=lambda name: (params[name].dtype == FP8, name)):  # scales are set with weights
            param = params[name]
            if param.ndim == 1:
                param.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            if param.device not in draws:
                draws[param.device] = torch.Generator(param.device).manual_seed(seed)
            if param.dtype != FP8:
                param.normal_(0.0, 0.02, generator=draws[param.device])
                continue
            wide = torch.empty(param.shape, device=param.device).normal_(0.0, 0.02, generator=draws[param.device])
            value, scale = quantised(wide)
            param.copy_(value)
            params[scale_of(name)].copy_(scale)
