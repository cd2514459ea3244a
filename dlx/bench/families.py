"""A family at its true shape with random weights: a prompt prefilled, an answer decoded, a forward timed."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from dlx import weights
from dlx.bench.clock import there, wait
from dlx.bench.forward import longest, measured
from dlx.bench.prompts import answered
from dlx.bench.scene import How, Scene
from dlx.convert import SHARD_BYTES, save
from dlx.errors import EngineError
from dlx.models import family
from dlx.provenance import provenance

FITS = 0.9  # of a GPU's memory, that weights may take
KEPT = ("graphs", "scene", "ms_per_forward", "floor_bytes", "floor_ms", "ratio", "experts_touched", "floor_note",
        "tokens_per_forward", "read_gbps", "graphs_s", "peak_gib")  # fmt: skip


def child() -> None:
    """Print the run that tools/families.py asks for, as JSON."""
    asked = json.loads(sys.argv[1])
    scene, how = Scene(Path(asked["scene"][0]), *asked["scene"][1:]), How(*asked["how"])
    device = torch.device(how.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    how = how._replace(device=str(device))
    meta = family(scene.card().arch).build(scene.card(), torch.device("meta"), torch.bfloat16)
    size = {"family": scene.card().family, "parameters": sum(p.numel() for p in meta.parameters())}
    need = sum(p.nbytes for p in meta.parameters())
    with there(device):
        if device.type == "cuda" and need > FITS * torch.cuda.get_device_properties(device).total_memory:
            run = {"needs_bytes": need}
        elif asked["folder"] is not None:
            run = {"load": loaded(scene, device, Path(asked["folder"])) | {"command": asked["command"]}}
        else:
            run = decoded(scene, how, asked["steps"], asked["tokens"]) | {
                "made": provenance(asked["command"], str(device))
            }
    print(json.dumps(size | run, default=str))


def decoded(scene: Scene, how: How, steps: int, tokens: int) -> dict[str, Any]:
    """What latency measures of a shape, and what a request of the scene's context and so many tokens takes."""
    began = time.monotonic()
    most = max(longest(scene, how, steps, scene.context), scene.context + tokens + scene.block)
    worker = scene.worker(how, most)
    wait(worker.device)
    built_s = time.monotonic() - began
    record = measured(worker, scene, steps, scene.context, first=False)
    done = answered(worker, scene.context, tokens)
    if len(done.ids) != tokens or worker.ids.mask in done.ids:
        raise EngineError(f"{len(done.ids)} of {tokens} tokens were decoded")
    prefill = {key: record["prefill"][key] for key in ("tokens", "ms", "flops", "of_matmul_rate")}
    answer = {"tokens": tokens, "nfe": done.nfe, "prefill_ms": done.prefill_ms, "wall_ms": done.wall_ms}
    return {key: record[key] for key in KEPT} | {"prefill": prefill, "answer": answer, "load_s": built_s}


@torch.no_grad()
def loaded(scene: Scene, device: torch.device, folder: Path) -> dict[str, Any]:
    """Random weights of the shape, written under its family's names, then loaded once: seconds, GB/s, whether equal.

    The files were just written, so they are read from the page cache where memory holds them.
    """
    card = scene.card()
    kind, dtype = family(card.arch), torch.bfloat16
    params = dict(kind.build(card, device, dtype).named_parameters())
    weights.random(params, 0)
    places = kind.places(card)

    def sums() -> list[int]:
        bits = {2: torch.int16, 4: torch.int32}
        parts = (weights.rows(params[p.param], p) for p in places.values())
        return torch.stack([part.contiguous().view(bits[part.itemsize]).sum() for part in parts]).tolist()

    folder.mkdir(parents=True, exist_ok=False)
    before, began = sums(), time.monotonic()
    stored = ({name: weights.rows(params[p.param], p).to("cpu", copy=True)} for name, p in places.items())
    save(folder, stored, SHARD_BYTES)
    write_s = time.monotonic() - began
    for param in params.values():
        param.zero_()
    wait(device)
    began = time.monotonic()
    weights.load(folder, places, params, kind.stacked(card), kind.skipped)
    wait(device)
    load_s = time.monotonic() - began
    files = sorted(folder.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    out = {"bytes": size, "files": len(files), "tensors": len(places), "write_s": write_s, "load_s": load_s,
           "gbps": size / load_s / 1e9, "equal": sums() == before, "page_cache": "just written"}  # fmt: skip
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    return out
