"""Time the ops at the shapes of real models: python -m dlx.ops.bench [op] [--shape NAME …] [--rows N …] [--json PATH]

A chain of calls on rotating inputs, larger than the L2 cache, is captured and replayed; contestants take turns. Shares
are of the read bandwidth and of the bf16 matmul rate measured in the same run; the larger of the two is given.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dlx.errors import ConfigError, DlxError
from dlx.ops import OPS
from dlx.ops.bench import dense, mixture, paged
from dlx.ops.bench.case import Case
from dlx.ops.bench.report import (
    FAILURES,
    HEAD,
    Result,
    Roof,
    cells,
    described,
    line,
    means,
    measure,
    release,
    smoke,
)
from dlx.ops.bench.shapes import SHAPES
from dlx.provenance import provenance, slug

FAILED, WRONG = 1, 2  # exit codes: a case failed; the arguments cannot be served


class Suite(NamedTuple):
    """Cases of a shape that belong together, and the ops that they time."""

    cases: Callable[[str], Iterable[Case]]
    ops: tuple[str, ...]


SUITES = {
    "linear": Suite(dense.linear, ("project", "accumulate")),
    "linear_fp8": Suite(dense.linear_fp8, ("project", "accumulate")),
    "candidates": Suite(dense.candidates, ("candidates",)),
    "candidates_topk": Suite(dense.candidates_topk, ("candidates",)),
    "attention": Suite(paged.attention, ("attention",)),
    "attention_fp8": Suite(paged.attention_fp8, ("attention",)),
    "kv_store": Suite(paged.kv_store, ("kv_store",)),
    "moe": Suite(mixture.moe, ("route", "experts")),
}


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    try:
        device = torch.device(args.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch finds no CUDA device; --device cpu times the references instead")
        return (on_cpu if device.type == "cpu" else on_gpu)(args, device)
    except DlxError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dlx.ops.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("op", nargs="?", choices=[*SUITES], help="all of them if left out")
    parser.add_argument(
        "--shape", nargs="+", choices=[*SHAPES], default=[*SHAPES], metavar="NAME", help=", ".join(SHAPES)
    )
    parser.add_argument("--rows", nargs="+", type=int, help="positions of a forward; all if left out")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: references on small cases")
    parser.add_argument(
        "--json", type=Path, help="write the record: a .json file, or a folder that gets <gpu>/<op>--<shape>.json"
    )
    return parser


def on_gpu(args: argparse.Namespace, device: torch.device) -> int:
    """Time the cases asked for; a record a suite and shape, so that what is done is kept whatever comes."""
    roof = Roof.of(device)
    release()
    print(f"read {roof.bytes_per_s / 1e9:.0f} GB/s, bf16 matmul {roof.flops_per_s / 1e12:.0f} TFLOP/s")
    print(line(HEAD))
    every: list[Result] = []
    faults = 0
    for name in [args.op] if args.op else SUITES:
        for shape in args.shape:
            cases = [c for c in SUITES[name].cases(shape) if not args.rows or c.rows in args.rows]
            done = [r for case in cases if (r := tried(case, device, roof)) is not None]
            faults += len(cases) - len(done)
            every += done
            if done and args.json and args.json.suffix != ".json":
                made = provenance(command(), "cuda")
                file = args.json / slug(made["machine"] or "") / f"{name}--{shape}.json"
                write(file, record(done, roof.describe(), made))
    for mean in means(every):
        print(sentence(mean))
    if args.json and args.json.suffix == ".json":
        write(args.json, record(every, roof.describe(), provenance(command(), "cuda")))
    return FAILED if faults else 0


def tried(case: Case, device: torch.device, roof: Roof) -> Result | None:
    """Time a case and print its row; a case that fails stops no other."""
    try:
        done = measure(case, device, roof)
        print(line(cells(done)), flush=True)
        return done
    except FAILURES as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        print(f"error: {case.op} {case.shape} {case.name}, {case.rows} rows: {said[0]}", file=sys.stderr)
        return None
    finally:
        release()


def on_cpu(args: argparse.Namespace, device: torch.device) -> int:
    """Run the references on their small cases."""
    torch.set_num_threads(1)
    names = SUITES[args.op].ops if args.op else tuple(OPS)
    print(line(HEAD))
    done = [r for name in names for r in smoke(OPS[name])]
    for r in done:
        print(line(cells(r)))
    if args.json:
        file = args.json if args.json.suffix == ".json" else args.json / "cpu" / f"{args.op or 'ops'}--small.json"
        write(file, record(done, {}, provenance(command(), "cpu")))
    return 0


def sentence(mean: dict[str, Any]) -> str:
    """What `means` found, in words."""
    shares = {"matmuls of a layer": mean["matmuls"], "with the head": mean["and_head"], "a step": mean["step"]}
    said = [f"{name} {100 * value:.1f} %" for name, value in shares.items() if value is not None]
    said += [f"{name} takes {times:.2f} × as long" for name, times in mean["times"].items() if times is not None]
    return f"{mean['op']} {mean['shape']}, {mean['rows']} rows, of read bandwidth by traffic: {', '.join(said)}"


def record(results: list[Result], roof: dict[str, float], made: dict[str, str | None]) -> dict[str, Any]:
    return {
        "schema": 1,
        "made": made,
        "roof": roof,
        "means": means(results),
        "results": [described(r) for r in results],
    }


def write(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def command() -> str:
    return shlex.join(["python", "-m", "dlx.ops.bench", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
