"""Search launch configurations on this GPU: python tools/tune.py --op linear --shape sdar-8b --rows 4 32 --budget-s 300

An op asks `dlx.ops.tuned` for its configuration. Here we answer instead: with one configuration after the other, while
the cases of `dlx.ops.bench` are timed. A field at a time is changed, and kept where it is faster; a configuration that
does not compile, does not fit or gives other numbers is left out. The best and the code's own are timed once more in
turns, and the winner is recorded in profiles/kernels/<gpu>/<op>.json, also where it is the code's own.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from dlx.errors import ConfigError, DlxError
from dlx.ops import tuned as records
from dlx.ops.bench.__main__ import SUITES
from dlx.ops.bench.case import Case
from dlx.ops.bench.chain import Built, Call, Took, captured, length, turns
from dlx.ops.bench.report import FAILURES, Roof, release
from dlx.ops.bench.shapes import SHAPES
from dlx.provenance import provenance, slug

KERNELS = Path(__file__).parents[1] / "profiles" / "kernels"
ROUNDS = 5  # of a search; the last comparison takes as many as a bench
GAIN = 0.995  # of the time of the best so far: what is less is noise
FAR = 0.02  # relative distance of results at which a configuration is wrong
# what a field may be; one that is not named here is halved, doubled, or turned
VALUES: dict[str, tuple[int, ...]] = {
    "warps": (1, 2, 4, 8, 16),
    "stages": (1, 2, 3, 4, 5, 6, 7, 8),
    "splits": (1, 2, 3, 4, 6, 8, 12, 16, 24, 32),
    "programs": (1, 2, 3, 4, 5, 6, 8),
}


class Ask(NamedTuple):
    """What an op asked for while a case ran."""

    op: str
    key: tuple[int, ...]
    default: Any
    fits: Callable[[Any], bool]


class Best(NamedTuple):
    """The outcome of a search, in microseconds beside the code's own configuration."""

    config: Any
    us: float
    default_us: float
    times: dict[Any, float]  # of every configuration that was tried


@contextmanager
def answering(answer: Callable[[Ask], Any]) -> Iterator[None]:
    """Whatever an op asks `tuned` for is answered here; what it had remembered is forgotten before and after."""
    with mock.patch.object(records, "found", lambda *ask: answer(Ask(*ask))):
        forget()
        yield
    forget()


def forget() -> None:
    """Empty the caches of the functions that choose configurations."""
    for name, module in list(sys.modules.items()):
        if name.startswith("dlx.ops"):
            for key, value in vars(module).items():
                if key.startswith("choose") and hasattr(value, "cache_clear"):
                    value.cache_clear()


def asked(call: Call) -> list[Ask]:
    """What one call asks for, each key once."""
    asks: dict[tuple[str, tuple[int, ...]], Ask] = {}

    def note(ask: Ask) -> Any:
        asks.setdefault((ask.op, ask.key), ask)
        return ask.default

    with answering(note):
        call(0)
    return list(asks.values())


def with_config(answers: dict[tuple[str, tuple[int, ...]], Any]) -> Callable[[Ask], Any]:
    """Answers by (op, key); the code's own where there is none."""
    return lambda ask: answers.get((ask.op, ask.key), ask.default)


def neighbours(config: Any, field: str) -> list[Any]:
    """The configurations that differ in one field, near ones first; of `programs` also with the memory shared anew."""
    value = getattr(config, field)
    if isinstance(value, bool):
        return [config._replace(**{field: not value})]
    values = VALUES.get(field) or [n for n in (value // 2, value * 2) if n >= 1]
    some = [config._replace(**{field: n}) for n in sorted(values, key=lambda n: abs(n - value)) if n != value]
    if field == "programs":  # of a processor: fewer may each have a longer pipeline
        some += [c._replace(stages=n) for c in some if 1 <= (n := config.stages * value // c.programs - 1) <= 8]
    return some


def search(ask: Ask, took: Callable[[Any], float], deadline: float, known: Any = None) -> tuple[Any, dict[Any, float]]:
    """(the fastest configuration found, the time of each tried): fields in turn, until none helps or time is over.

    known  where to begin, if it is faster than the code's own: what is recorded, so that a short search loses nothing
    """
    times: dict[Any, float] = {config: took(config) for config in dict.fromkeys((ask.default, known or ask.default))}
    best = min(times, key=lambda config: times[config])
    while True:
        before = best
        for field in best._fields:
            for config in neighbours(best, field):
                if config in times or not ask.fits(config):
                    continue
                if time.monotonic() > deadline:
                    return best, times
                times[config] = took(config)
                if times[config] < GAIN * times[best]:
                    best = config
        if best == before:
            return best, times


def apart(got: object, want: object) -> float:
    """How far results are from each other, relative to their size; of integers the share that differs."""
    pairs = zip(tensors(got), tensors(want), strict=True)
    return max((_apart(g, w) for g, w in pairs), default=0.0)


def _apart(got: Tensor, want: Tensor) -> float:
    if not want.is_floating_point():
        return float((got != want).float().mean())
    return float((got.float() - want.float()).norm() / want.float().norm().clamp_min(1e-30))


def tensors(result: object) -> list[Tensor]:
    """Copies of what a call returned."""
    some = result if isinstance(result, tuple | list) else (result,)
    return [x.clone() for x in some if isinstance(x, Tensor)]


def timed_under(built: Built, ask: Ask, others: dict[Any, Any], want: list[Tensor], config: Any) -> float:
    """Microseconds a call under a configuration; infinite if it fails or gives other numbers."""
    try:
        with answering(with_config(others | {(ask.op, ask.key): config})):
            if not apart(tensors(built.own(0)), want) <= FAR:
                return float("inf")
            n = length(built)
            graph = captured(built.own, built.copies, n)
    except FAILURES:
        return float("inf")
    return turns({"own": graph}, n, ROUNDS)["own"].us


def tune(case: Case, device: torch.device, done: set[Any], deadline: float) -> Iterator[tuple[Ask, Built, Best]]:
    """Search for each configuration that a case asks for and that is not done yet."""
    built = case.build(device)
    answers: dict[Any, Any] = {}
    for ask in asked(built.own):
        if (ask.op, ask.key) in done:
            continue
        with answering(with_config(answers)):
            want = tensors(built.own(0))
        config, times = search(ask, partial(timed_under, built, ask, answers, want), deadline, records.tuned(*ask))
        final = compare(built, ask, answers, config)
        if final["best"].us >= GAIN * final["default"].us:
            config, final = ask.default, final | {"best": final["default"]}
        answers[ask.op, ask.key] = config
        yield ask, built, Best(config, final["best"].us, final["default"].us, times)


def compare(built: Built, ask: Ask, answers: dict[Any, Any], config: Any) -> dict[str, Took]:
    """The code's configuration and the best one, in turns."""
    n = length(built)
    graphs = {}
    for name, some in (("default", ask.default), ("best", config)):
        with answering(with_config(answers | {(ask.op, ask.key): some})):
            graphs[name] = captured(built.own, built.copies, n)
    return turns(graphs, n)


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


def write(folder: Path, op: str, found: list[dict[str, Any]]) -> Path:
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
        "made": provenance(shlex.join(["python", *sys.argv]), "cuda"),
    }
    lines = ",\n".join("  " + json.dumps(entry, ensure_ascii=False) for entry in merged(old, found))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1)[:-2] + ',\n "configs": [\n' + lines + "\n ]\n}\n")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=[*SUITES], default=[*SUITES], metavar="NAME", help=", ".join(SUITES))
    parser.add_argument(
        "--shape", nargs="+", choices=[*SHAPES], default=[*SHAPES], metavar="NAME", help=", ".join(SHAPES)
    )
    parser.add_argument("--rows", nargs="+", type=int, help="positions of a forward; all if left out")
    parser.add_argument("--budget-s", type=float, default=540.0, help="seconds in all, shared evenly (default 540)")
    parser.add_argument("--folder", type=Path, default=KERNELS, help="where records go (default profiles/kernels)")
    parser.add_argument("--trials", type=Path, help="append every configuration with its time to this file of lines")
    args = parser.parse_args(argv)
    try:
        if not torch.cuda.is_available():
            raise ConfigError("torch finds no CUDA device; launch configurations are tuned on a GPU")
        run(args, torch.device("cuda"), time.monotonic() + args.budget_s)
    except DlxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace, device: torch.device, end: float) -> None:
    """Tune case after case; the files are written after each, so that what is done is kept."""
    roof = Roof.of(device)
    cases = [c for op in args.op for shape in args.shape for c in SUITES[op].cases(shape)]
    cases = [c for c in cases if not args.rows or c.rows in args.rows]
    found: dict[str, list[dict[str, Any]]] = {}
    done: set[Any] = set()
    for i, case in enumerate(cases):
        now = time.monotonic()
        if now > end:
            print(f"time is over: {len(cases) - i} of {len(cases)} cases are left out")
            return
        title = f"{case.op} {case.shape} {case.name}, {case.rows} rows"
        try:
            for ask, built, best in tune(case, device, done, now + (end - now) / (len(cases) - i)):
                done.add((ask.op, ask.key))
                entry = described(title, ask, built, best, roof)
                print(f"{title}: {len(best.times)} tried, {json.dumps(entry)}", flush=True)
                found.setdefault(ask.op, []).append(entry)
                write(args.folder, ask.op, found[ask.op])
                if args.trials:
                    note(args.trials, title, best.times)
        except FAILURES as error:
            print(f"error: {title}: {error}", file=sys.stderr)
        release()


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


if __name__ == "__main__":
    sys.exit(main())
