"""Checkpoint folders: configs, and safetensors copied tensor by tensor into the parameters of a network."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dlx.errors import ModelError
from dlx.models.card import Place

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
FLOATS = {"F64", "F32", "F16", "BF16"}  # dtypes as safetensors' headers name them
SPARE = {"lm_head.weight", "model.transformer.ff_out.weight"}  # a tied checkpoint may carry its embedding a second time
SHOWN = 20  # wrong tensors that one message names

Json = dict[str, object]
Shard = Any  # safetensors ships no type for what safe_open returns


def read_config(folder: str | Path) -> tuple[Json, Json]:
    """config.json and generation_config.json of a checkpoint folder; the second is `{}` if it is not there.

    Raises ModelError  no such folder, no config.json, or a file that is no JSON object
    """
    folder = _folder(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no config.json; name the folder of a checkpoint in the Hugging Face layout")
    generation = folder / "generation_config.json"
    return read_json(path), read_json(generation) if generation.is_file() else {}


def read_json(path: Path) -> Json:
    """The JSON object in a file of a checkpoint; ModelError if it cannot be read or is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}; expected a JSON object; fetch the file again")
    return value


def load(
    folder: str | Path,
    places: Mapping[str, Place],
    params: Mapping[str, Tensor],
    stacked: Mapping[str, Place] | None = None,
    skipped: tuple[str, ...] = (),
) -> None:
    """Fill `params` in place from the safetensors of a checkpoint folder.

    Every tensor is checked by the shards' headers before the first one is read; then each is copied to its
    rows, with the parameter's device and dtype.

    places  checkpoint name → where it goes; together they cover every row of every parameter
    params  parameter name → tensor on its device
    stacked names of tensors that, where they are there, stand for all places of their parameter
    skipped how the names of tensors begin that are not loaded
    Work    linear in the number of tensors; holds one checkpoint tensor beside the parameters
    Raises ModelError  no weights, pickle weights, a damaged or missing shard; missing, extra, misshapen or
                       non-float tensors, each named
    """
    rows = dict.fromkeys(params, 0)
    for place in places.values():
        rows[place.param] += place.rows
    assert rows == {name: len(_rows(param)) for name, param in params.items()}, "places must cover the parameters"
    with ExitStack() as stack:
        shards = [(path, stack.enter_context(_open(path))) for path in _shards(_folder(folder))]
        names = {name for _, shard in shards for name in shard.keys()}  # noqa: SIM118 (a shard is no mapping)
        places = _with(places, {name: place for name, place in (stacked or {}).items() if name in names})
        found = _check(folder, places, shards, skipped)
        for name, (path, shard) in found.items():
            place = places[name]
            with torch.no_grad():
                part = _rows(params[place.param]).narrow(0, place.row, place.rows)
                part.copy_(_rows(_read(path, shard, name)))


def _rows(x: Tensor) -> Tensor:
    """A matrix of the vectors along the last axis; a vector as it is."""
    return x.flatten(0, -2) if x.ndim > 1 else x


def _with(places: Mapping[str, Place], stacked: Mapping[str, Place]) -> Mapping[str, Place]:
    """Places in which these tensors stand for all others of their parameters."""
    taken = {place.param for place in stacked.values()}
    return {name: place for name, place in places.items() if place.param not in taken} | dict(stacked)


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


def _folder(folder: str | Path) -> Path:
    folder = Path(folder).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"{folder} is a file; name the checkpoint's folder, {folder.parent}")
    raise ModelError(
        f"the folder {folder} does not exist; dlx reads local folders: "
        f"fetch a checkpoint with `hf download ORG/NAME --local-dir DIR` and name DIR"
    )


def _shards(folder: Path) -> list[Path]:
    """The safetensors files of a folder: model.safetensors, else those its index names."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        raise _no_weights(folder)
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
        raise ModelError(f'{index} has no "weight_map" of tensor names to files; fetch the file again')
    shards = sorted(set(names.values()))
    for name in shards:
        # a plain name of a file in the folder; the file itself may be a link, as in the Hugging Face cache
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ModelError(f"{index} names the shard {name!r}; allowed are *.safetensors files in the same folder")
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder} lacks {_listed(missing)}, which {INDEX} names; fetch the missing files")
    return [folder / name for name in shards]


def _no_weights(folder: Path) -> ModelError:
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        return ModelError(
            f"{folder} has pickle weights only ({_listed(pickles)}); dlx reads safetensors, "
            "as a pickle may run code. Convert a checkpoint you trust with transformers: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    return ModelError(f"{folder} has no weights; expected {SINGLE}, or {INDEX} and the shards it names")


def _open(path: Path) -> Shard:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is truncated or no safetensors file ({error}); fetch the file again") from error


def _read(path: Path, shard: Shard, name: str) -> Tensor:
    try:
        return shard.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: the tensor {name} cannot be read ({error}); fetch the file again") from error


def _check(
    folder: str | Path, places: Mapping[str, Place], shards: list[tuple[Path, Shard]], skipped: tuple[str, ...]
) -> dict[str, tuple[Path, Shard]]:
    """Each wanted tensor → its shard; raises one ModelError that names all that is wrong."""
    found: dict[str, tuple[Path, Shard]] = {}
    wrong: list[str] = []
    for path, shard in shards:
        for name in shard.keys():  # noqa: SIM118 (a shard is no mapping: it cannot be iterated)
            if name not in places:
                if name not in SPARE and not name.startswith(skipped):
                    wrong.append(f"{name} is extra (in {path.name}; the network has no such tensor)")
            elif name in found:
                wrong.append(f"{name} is twice there (in {found[name][0].name} and {path.name})")
            else:
                found[name] = path, shard
                wrong.extend(_misfit(name, shard, places[name]))
    wrong.extend(f"{name} is missing (shape {list(places[name].shape)})" for name in places if name not in found)
    if wrong:
        raise ModelError(
            f"the tensors of {folder} are not those of its config.json: {_listed(wrong, '; ')}. "
            "Check that config.json and weights are of the same checkpoint"
        )
    return found


def _misfit(name: str, shard: Shard, place: Place) -> Iterator[str]:
    view = shard.get_slice(name)
    shape, dtype = tuple(view.get_shape()), view.get_dtype()
    if shape != place.shape:
        yield f"{name} has shape {list(shape)}, expected {list(place.shape)}"
    if dtype not in FLOATS:
        yield f"{name} has dtype {dtype}, expected one of {', '.join(sorted(FLOATS))}"


def _listed(names: list[str], gap: str = ", ") -> str:
    more = len(names) - SHOWN
    return gap.join(names[:SHOWN]) + (f"{gap}and {more} more" if more > 0 else "")
