"""Launch configurations of the ops, searched case by case on this GPU: profiles/kernels/<gpu>/<op>.json."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dlx.errors import ConfigError
from dlx.ops import tuned as records
from dlx.ops.bench.__main__ import SUITES
from dlx.ops.bench.chain import Built
from dlx.ops.bench.report import FAILURES, Roof, release
from dlx.ops.bench.search import Ask, Best, tune
from dlx.provenance import provenance, slug


def merged(old: object, new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries of a file with those just found in their place, ordered by key; what has other fields is dropped."""
    kept = old.get("configs", []) if isinstance(old, dict) and old.get("schema") == records.SCHEMA else []
    fields = set(new[0]["config"])
    entries = {
        tuple(entry["key"]): entry
        for entry in [*kept, *new]
        if isinstance(entry, dict) and isinstance(entry.get("config"), dict) and set(entry["config"]) == fields
    }
    return [entries[key] for key in sorted(entries, key=lambda key: (key[1:], key[0]))]


def write(folder: Path, op: str, found: list[dict[str, Any]], command: str) -> Path:
    """Record what was found for an op, beside what its file holds of other keys."""
    gpu = torch.cuda.get_device_name()
    path = folder / slug(gpu) / f"{op}.json"
    try:
        old: Any = json.loads(path.read_bytes())
    except (OSError, ValueError):
        old = {}
    value = {
        "schema": records.SCHEMA,
        "op": op,
        "gpu": gpu,
        "capability": list(torch.cuda.get_device_capability()),
        "default": old.get("default") if isinstance(old, dict) else None,
        "made": provenance(command, "cuda"),
    }
    lines = ",\n".join("  " + json.dumps(entry, ensure_ascii=False) for entry in merged(old, found))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1)[:-2] + ',\n "configs": [\n' + lines + "\n ]\n}\n")
    return path


def run(
    ops: Sequence[str], shapes: Sequence[str], rows: Sequence[int], budget_s: float, folder: Path, trials: Path | None,
    command: str, as_json: bool = False,
) -> None:  # fmt: skip
    """Tune case after case; the files are written after each, so that what is done is kept.

    rows    positions of a forward; all if empty
    trials  file of lines to which every configuration is appended with its time
    as_json  stdout gets a JSON object a case
    Raises ConfigError without a GPU
    """
    if not torch.cuda.is_available():
        raise ConfigError("torch finds no CUDA device; launch configurations are tuned on a GPU")
    end, device = time.monotonic() + budget_s, torch.device("cuda")
    roof = Roof.of(device)
    cases = [c for op in ops for shape in shapes for c in SUITES[op].cases(shape)]
    cases = [c for c in cases if not rows or c.rows in rows]
    found: dict[str, list[dict[str, Any]]] = {}
    done: set[Any] = set()
    for i, case in enumerate(cases):
        now = time.monotonic()
        if now > end:
            print(f"time is over: {len(cases) - i} of {len(cases)} cases are left out", file=sys.stderr)
            return
        title = f"{case.op} {case.shape} {case.name}, {case.rows} rows"
        try:
            for ask, built, best in tune(case, device, done, now + (end - now) / (len(cases) - i)):
                done.add((ask.op, ask.key))
                entry = described(title, ask, built, best, roof)
                print(line(title, len(best.times), entry, as_json), flush=True)
                found.setdefault(ask.op, []).append(entry)
                write(folder, ask.op, found[ask.op], command)
                if trials:
                    note(trials, title, best.times)
        except FAILURES as error:
            print(f"error: {title}: {error}", file=sys.stderr)
        release()


def line(title: str, tried: int, entry: dict[str, Any], as_json: bool) -> str:
    """What stdout gets of a case that was tuned."""
    return (
        json.dumps({"case": title, "tried": tried, **entry})
        if as_json
        else f"{title}: {tried} tried, {json.dumps(entry)}"
    )


def note(path: Path, title: str, times: dict[Any, float]) -> None:
    """Append a line a configuration tried, the fastest first; one that failed or gave other numbers has no time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for config, us in sorted(times.items(), key=lambda pair: pair[1]):
            took = round(us, 3) if us < float("inf") else None
            file.write(json.dumps({"case": title, "config": config._asdict(), "us": took}) + "\n")


def described(title: str, ask: Ask, built: Built, best: Best, roof: Roof) -> dict[str, Any]:
    """An entry of a file."""
    least_s = max(built.cost.bytes / roof.bytes_per_s, built.cost.flops / roof.flops_per_s)
    return {
        "key": list(ask.key),
        "config": best.config._asdict(),
        "us": round(best.us, 3),
        "default_us": round(best.default_us, 3),
        "of_roof": round(least_s * 1e6 / best.us, 4),
        "case": title,
    }
