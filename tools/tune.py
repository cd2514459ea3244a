"""Search launch configurations on this GPU: python tools/tune.py --op linear --shape sdar-8b --rows 4 32 --budget-s 300

The winners are recorded in profiles/kernels/<gpu>/<op>.json; a door to dlx.ops.bench.tune, as `dlx tune` is.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

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
    parser.add_argument("--budget-s", type=float, default=540.0, help="seconds in all, shared evenly (default 540)")
    parser.add_argument("--folder", type=Path, default=tuned.folder(), help="of records (default profiles/kernels)")
    parser.add_argument("--trials", type=Path, help="append every configuration with its time to this file of lines")
    args = parser.parse_args(argv)
    command = shlex.join(["python", "tools/tune.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        run(args.op, args.shape, args.rows or (), args.budget_s, args.folder, args.trials, command)
    except DlxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
