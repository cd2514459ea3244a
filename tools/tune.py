"""Search launch configurations on this GPU:

python tools/tune.py --op linear --shape sdar-8b --rows 4 32 --budget-s 300              in a chain of one op's calls
python tools/tune.py --op linear --shape sdar-8b --block 32 --context 1024 --budget-s 60     in the very step

The winners are recorded in profiles/kernels/<gpu>/<op>.json; a door to dlx.ops.bench.tune, as `dlx tune` is.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from dlx.bench.tuning import scenes
from dlx.bench.tuning import tune as within
from dlx.errors import DlxError
from dlx.ops import tuned
from dlx.ops.bench.__main__ import SUITES
from dlx.ops.bench.shapes import SHAPES
from dlx.ops.bench.tune import run


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=[*SUITES], default=[*SUITES], metavar="NAME", help=", ".join(SUITES))
    parser.add_argument(
        "--shape", nargs="+", choices=[*SHAPES], default=[*SHAPES], metavar="NAME", help=", ".join(SHAPES)
    )
    parser.add_argument("--rows", nargs="+", type=int, help="positions of a forward; all if left out")
    parser.add_argument("--block", type=int, help="search in a step with blocks of so many tokens")
    parser.add_argument("--context", type=int, default=1024, help="with --block: tokens before the answer")
    parser.add_argument("--requests", type=int, default=1, help="with --block")
    parser.add_argument("--budget-s", type=float, default=540.0, help="seconds in all, shared evenly (default 540)")
    parser.add_argument("--folder", type=Path, default=tuned.folder(), help="of records (default profiles/kernels)")
    parser.add_argument("--trials", type=Path, help="append every configuration with its time to this file of lines")
    args = parser.parse_args(argv)
    command = shlex.join(["python", "tools/tune.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        if args.block:
            steps = scenes(args.shape, args.block, args.context, args.requests, args.rows or ())
            within(steps, args.op, args.budget_s, args.folder, args.trials, command)
            return 0
        run(args.op, args.shape, args.rows or (), args.budget_s, args.folder, args.trials, command)
    except DlxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
