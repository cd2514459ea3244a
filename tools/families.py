"""Every shape of dlx/bench/shapes at its true size with random weights: built, a prompt prefilled, an answer decoded.

python tools/families.py --json FILE [--shapes llada-8b sdar-8b]   adds to the runs in FILE, each as it is done
python tools/families.py --json FILE --shapes sdar-8b --weights FOLDER   writes a checkpoint there and loads it once

Each shape has a process of its own, so that what one leaves behind, or needs too much of, is nothing to the next.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dlx.bench.arguments import SHAPES, add_how, how, shape, write
from dlx.bench.forward import SCHEMA
from dlx.bench.scene import How, published
from dlx.bench.start import in_process
from dlx.environment import inherited
from dlx.errors import DlxError
from dlx.models.card import Card

ACCEPT = 4  # tokens a forward

Run = dict[str, Any]


def families(
    shapes: Sequence[Path], how: How, steps: int, prompt: int, tokens: int, command: str, folder: Path | None = None,
    before: Mapping[str, Run] | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:  # fmt: skip
    """(name, record) after each shape; `runs` of the record hold those of `before` and all so far.

    steps           forwards that are timed
    prompt, tokens  of the one request that is answered
    folder          if given, nothing is decoded: the weights are written there, loaded once, and removed
    """
    runs: dict[str, Run] = dict(before or {})
    for path in shapes:
        name = path.name if path.is_dir() else path.stem
        run = {key: value for key, value in runs.get(name, {}).items() if key != "failed"}
        try:
            block = Card.from_hf(published(path), {}).blocks[0]
            asked = {
                "scene": [str(path.absolute()), block, prompt, 1, ACCEPT],
                "how": list(how),
                "steps": steps,
                "tokens": tokens,
                "command": command,
                "folder": folder and str(folder),
            }
            run |= in_process("from dlx.bench.families import child; child()", asked, inherited())
        except DlxError as error:
            run["failed"] = str(error).splitlines()[-1]
        runs[name] = run
        yield name, {"schema": SCHEMA, "what": "families", "runs": dict(runs)}


def line(name: str, run: Run) -> str:
    """What a run says."""
    said = f"{name}: {run.get('parameters', 0) / 1e9:.2f} G parameters; "
    if "failed" in run:
        return f"{said}failed: {run['failed']}"
    if "needs_bytes" in run:
        return f"{said}{run['needs_bytes'] / 1e9:.0f} GB of weights do not fit"
    if ms := run.get("ms_per_forward"):
        experts, answer = run["experts_touched"], run["answer"]
        touched = f"{experts['mean']:.1f} of {experts['of']} experts a layer, " if experts else ""
        said += (
            f"{ms.get('mean', ms['p50']):.3f} ms a forward, floor {run['floor_ms']:.3f}, ratio {run['ratio']:.3f}, "
            f"{touched}prefill of {run['prefill']['tokens']} {run['prefill']['ms']['p50']:.2f} ms, {answer['tokens']} "
            f"tokens in {answer['nfe']} forwards, peak {run['peak_gib']:.1f} GiB, graphs {run['graphs_s']:.0f} s; "
        )
    if "load" in run:
        load = run["load"]
        same = "equal" if load["equal"] else "NOT EQUAL"
        said += f"{load['bytes'] / 1e9:.1f} GB in {load['files']} files loaded at {load['gbps']:.2f} GB/s, {same}; "
    return said.removesuffix("; ")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", metavar="SHAPE", help="names of dlx/bench/shapes, or folders; else all")
    parser.add_argument("--steps", type=int, default=64, help="forwards timed")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the request's prompt")
    parser.add_argument("--tokens", type=int, default=64, help="of its answer")
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="write weights there and load them once instead")
    add_how(parser)
    args = parser.parse_args(argv)
    command = shlex.join(["python", "tools/families.py", *(sys.argv[1:] if argv is None else argv)])
    names = args.shapes or [path.stem for path in sorted(SHAPES.glob("*.json")) if path.stem != "nano"]
    before = json.loads(args.json.read_text())["runs"] if args.json and args.json.is_file() else None
    failed = 0
    try:
        paths = [shape(name) for name in names]
        runs = families(paths, how(args), args.steps, args.prompt, args.tokens, command, args.weights, before)
        for name, record in runs:
            print(line(name, record["runs"][name]), flush=True)
            write(args.json, record)
            failed |= "failed" in record["runs"][name]
    except DlxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return failed


if __name__ == "__main__":
    sys.exit(main())
