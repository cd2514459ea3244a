"""The files of a checkpoint folder: its configs, and what the headers of its safetensors say. Nothing is executed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dlx.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
SPARE = {"lm_head.weight", "model.transformer.ff_out.weight"}  # a tied checkpoint may carry its embedding a second time
SHOWN = 20  # wrong tensors that one message names

Json = dict[str, object]
Shard = Any  # safetensors ships no type for what safe_open returns


class Stored(NamedTuple):
    """A tensor of a checkpoint, as the header of its file tells it."""

    path: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it


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
    inside(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}; expected a JSON object; fetch the file again")
    return value


def index(folder: str | Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder as the headers tell it; see `headers`."""
    return headers(_shards(_folder(folder)))


def headers(paths: Iterable[Path]) -> dict[str, Stored]:
    """Every tensor of some safetensors files. Each header is read once, and no tensor.

    Raises ModelError  a damaged file, a tensor that is in two of them, or one whose name is no line of text
    """
    found: dict[str, Stored] = {}
    for path in paths:
        with opened(path) as shard:
            for name in shard.keys():  # noqa: SIM118 (a shard is no mapping: it cannot be iterated)
                if not name.isprintable():
                    raise ModelError(f"{path}: {name!r} is no name of a tensor; fetch the file again")
                if name in found and name not in SPARE:
                    raise ModelError(
                        f"{path.parent}: {name} is twice there (in {found[name].path.name} and {path.name}); "
                        "remove the file that does not belong to the checkpoint"
                    )
                view = shard.get_slice(name)
                found[name] = Stored(path, tuple(view.get_shape()), view.get_dtype())
    return found


def inside(path: Path) -> Path:
    """`path`, if it lies in its folder, as a link too; ModelError for a link that leads out.

    In the Hugging Face cache models--ORG--NAME/snapshots/REVISION holds links to models--ORG--NAME/blobs: from a
    folder below `snapshots`, links into the `blobs` beside it are allowed.
    """
    home, real = path.parent.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs"
    if real.is_relative_to(home) or (home.parent.name == "snapshots" and real.is_relative_to(blobs)):
        return path
    raise ModelError(f"{path} is a link to {real}, outside of its folder; put the file itself there")


def _folder(folder: str | Path) -> Path:
    folder = Path(folder).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"{folder} is a file; name the checkpoint's folder, {folder.parent}")
    raise ModelError(
        f"the folder {folder} does not exist; name a checkpoint's folder, or ORG/NAME at huggingface.co "
        "(`hf download ORG/NAME --local-dir DIR` fetches one for a machine without a network)"
    )


def _shards(folder: Path) -> list[Path]:
    """The safetensors files of a folder: model.safetensors, else those its index names."""
    if inside(folder / SINGLE).is_file():  # a link that leads out is told before what it leads to is looked for
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        raise _no_weights(folder)
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
        raise ModelError(f'{index} has no "weight_map" of tensor names to files; fetch the file again')
    shards = sorted(set(names.values()))
    for name in shards:
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors") or not name.isprintable():
            raise ModelError(f"{index} names the shard {name!r}; allowed are *.safetensors files in the same folder")
    paths = [inside(folder / name) for name in shards]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ModelError(f"{folder} lacks {listed(missing)}, which {INDEX} names; fetch the missing files")
    return paths


def _no_weights(folder: Path) -> ModelError:
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        return ModelError(
            f"{folder} has pickle weights only ({listed(pickles)}); dlx reads safetensors, "
            "as a pickle may run code. Convert a checkpoint you trust with transformers: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    return ModelError(f"{folder} has no weights; expected {SINGLE}, or {INDEX} and the shards it names")


def opened(path: Path) -> Shard:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is truncated or no safetensors file ({error}); fetch the file again") from error


def read(path: Path, shard: Shard, name: str) -> Tensor:
    try:
        return shard.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: the tensor {name} cannot be read ({error}); fetch the file again") from error


def listed(names: list[str], gap: str = ", ") -> str:
    more = len(names) - SHOWN
    return gap.join(names[:SHOWN]) + (f"{gap}and {more} more" if more > 0 else "")
