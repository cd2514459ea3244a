"""The arguments that the tools share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlx.bench.scene import How, Scene, published
from dlx.config import KV_DTYPES
from dlx.errors import ConfigError
from dlx.models.card import Card

SHAPES = Path(__file__).parent / "shapes"  # config.json of real models, by name


def add_scene(parser: argparse.ArgumentParser) -> None:
    """What is measured."""
    parser.add_argument("--shape", default="sdar-8b", help="a name of dlx/bench/shapes, or a checkpoint's folder")
    parser.add_argument("--block", type=int, help="tokens a block; else as many as the shape was trained for")
    parser.add_argument("--blocks", type=int, default=1, help="blocks of a row that decode at once")
    parser.add_argument("--context", type=int, default=1024, help="tokens before the answer")
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--accept", type=int, default=4, help="tokens accepted a forward")


def add_how(parser: argparse.ArgumentParser) -> None:
    """How it runs, and where the record goes."""
    parser.add_argument("--graphs", choices=["off", "compile", "capture"], help="else capture on CUDA, off on a CPU")
    parser.add_argument("--device", help="cuda or cpu; else CUDA if there is a GPU")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="else bfloat16 on CUDA, float32 on a CPU")
    parser.add_argument("--forwards", type=int, default=1, help="that one launch may run on the device")
    parser.add_argument("--unroll", action="store_true", help="a launch runs its forwards one after the other")
    parser.add_argument("--quantization", choices=["fp8"], help="weights of the layers in fp8")
    parser.add_argument("--kv-cache-dtype", choices=list(KV_DTYPES), help="of K/V pages; else the model's")
    parser.add_argument("--batch-invariant", action="store_true", help="launches of one shape, whatever the batch")
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048, help="of prompts, that a launch prefills")
    parser.add_argument("--json", type=Path, help="write the record there")


def scene(args: argparse.Namespace) -> Scene:
    """What `add_scene` was given. Raises ConfigError for what cannot be."""
    return asked(args.shape, args.block, args.blocks, args.context, args.requests, args.accept)


def asked(name: str, block: int | None, blocks: int, context: int, requests: int, accept: int) -> Scene:
    """The scene of a shape, by name or folder; None is the block length that it was trained with."""
    given = {"block": block, "blocks": blocks, "context": context, "requests": requests, "accept": accept}
    for flag, value in given.items():
        if value is not None and value < 1:
            raise ConfigError(f"--{flag} {value} is not allowed; use 1 or more")
    where = shape(name)
    return Scene(where, block or Card.from_hf(published(where), {}).blocks[0], context, requests, accept, blocks)


def shape(name: str) -> Path:
    """A shape's config.json by name, or a checkpoint's folder."""
    known = {path.stem: path for path in sorted(SHAPES.glob("*.json"))}
    if name in known:
        return known[name]
    if not Path(name).exists():
        raise ConfigError(f"--shape {name} is neither a folder nor a shape; known shapes are {', '.join(known)}")
    return Path(name)


def how(args: argparse.Namespace) -> How:
    """What `add_how` was given."""
    return How(
        args.graphs, args.device, args.dtype, args.forwards, args.unroll, args.quantization, args.kv_cache_dtype,
        args.batch_invariant, args.max_num_batched_tokens,
    )  # fmt: skip


def write(path: Path | None, record: Mapping[str, Any]) -> None:
    """Write a record, where it was asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False, default=str) + "\n")
