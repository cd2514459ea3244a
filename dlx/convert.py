"""Checkpoints rewritten as dlx holds them: one tensor a parameter, with an adapter merged, or in fp8.

A converted folder loads without renaming and fusing. Its config.json is the old one with `dlx_layout` added, and for
fp8 `quantization_config`; the tokenizer's files are copied.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dlx import weights
from dlx.errors import CapacityError, ConfigError, ModelError
from dlx.models import family
from dlx.models.card import Card, Place
from dlx.models.families import OWN_FP8
from dlx.models.layers import Linear
from dlx.network import outline
from dlx.weights.fp8 import quantised, scale_of

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SHARD_BYTES = 5 << 30
COPIED = ("*.json", "*.jinja", "*.txt", "*.model")  # generation_config and the tokenizer; config and index are ours


def convert(
    model: str | Path,
    out: str | Path,
    lora: str | Path | None = None,
    fp8: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a checkpoint as dlx holds it; the folder, which appears whole or not at all.

    Loaded back, every parameter equals that of the original loaded in the dtype of its file, bit for bit; with `lora`
    that of the original with the adapter merged. With `fp8` matmul weights are `quantised`; embeddings, head, norms
    and routers are left.

    Work   a parameter is read, and a shard of `shard_bytes` is held, at a time
    Raises ConfigError    `out` is there, or cannot be written
           CapacityError  no room for it
           ModelError     a checkpoint or an adapter that cannot be loaded
    """
    model, out = Path(model).expanduser(), Path(out).expanduser()
    if out.exists():
        raise ConfigError(f"out={str(out)!r} is there already; name a folder that is not, or remove it")
    raw, generation = weights.read_config(model)
    card = Card.from_hf(raw, generation)
    if card.fp8:
        raise ModelError(f"{model} is in fp8 already; convert the checkpoint that it was made of")
    if fp8 and card.gemma is not None:
        raise ConfigError(f"fp8 is not there for {card.family} ({model}); convert it without")
    net, places, stored = outline(model, card, raw, torch.bfloat16)
    params, named = dict(net.named_parameters()), family(card.arch).places(card)
    deltas = {} if lora is None else weights.Adapter.open(lora, named).deltas(named)
    of: dict[str, dict[str, Place]] = {}
    for name, place in places.items():
        of.setdefault(place.param, {})[name] = place
    small = matmuls(net) if fp8 else set[str]()

    def tensors(param: str) -> dict[str, Tensor]:
        """What is written for a parameter: itself, or its fp8 weight and scale."""
        dtype = _widest([DTYPES[stored[name].dtype] for name in of[param]])
        value = torch.empty(params[param].shape, dtype=torch.float32 if param in small else dtype)
        weights.fill(stored, of[param], {param: value}, deltas=deltas, progress=False)
        return dict(zip((param, scale_of(param)), quantised(value))) if param in small else {param: value}

    fresh = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        fresh.mkdir(parents=True)
        save(fresh, (tensors(param) for param in params), shard_bytes)
        for path in (path for pattern in COPIED for path in sorted(model.glob(pattern))):
            if path.name not in ("config.json", weights.INDEX):
                shutil.copyfile(weights.inside(path), fresh / path.name)
        marks = {weights.LAYOUT: weights.FUSED} | ({"quantization_config": OWN_FP8} if fp8 else {})
        (fresh / "config.json").write_text(json.dumps(raw | marks, indent=2))
        fresh.rename(out)
    except OSError as error:
        why = f"out={str(out)!r} cannot be written: {error.strerror}; use another folder"
        raise (CapacityError if error.errno in (errno.ENOSPC, errno.EDQUOT) else ConfigError)(why) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return out


def matmuls(net: nn.Module) -> set[str]:
    """The parameters that fp8 is for: weights of linear layers, and stacks of experts."""
    linear = {f"{name}.weight" for name, module in net.named_modules() if isinstance(module, Linear)}
    return linear | {name for name, param in net.named_parameters() if param.ndim == 3}


def _widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest


def save(folder: Path, parts: Iterator[Mapping[str, Tensor]], shard_bytes: int) -> None:
    """Safetensors of `shard_bytes` at most, or of one parameter; an index if they are several."""
    files: list[Path] = []
    index: dict[str, int] = {}
    held: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        files.append(folder / f"{len(files)}.safetensors")
        save_file(held, files[-1], {"format": "pt"})
        held.clear()

    for part in parts:
        size = sum(tensor.nbytes for tensor in part.values())
        if held and size + sum(tensor.nbytes for tensor in held.values()) > shard_bytes:
            flush()
        held.update(part)
        index |= dict.fromkeys(part, len(files))
        total += size
    flush()
    if len(files) == 1:
        files[0].rename(folder / weights.SINGLE)
        return
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    for path, name in zip(files, names, strict=True):
        path.rename(folder / name)
    table = {"metadata": {"total_size": total}, "weight_map": {name: names[i] for name, i in index.items()}}
    (folder / weights.INDEX).write_text(json.dumps(table, indent=2))
