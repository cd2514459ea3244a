"""The step of a shape by kernel: bytes, floor, time. python tools/roofline.py --shape sdar-8b --block 4 --context 1024

On a CPU the bytes and the floor alone.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from dlx.bench import roofline
from dlx.bench.arguments import add_how, add_scene, how, scene, write
from dlx.bench.report import lines
from dlx.errors import DlxError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_scene(parser)
    add_how(parser)
    args = parser.parse_args(argv)
    command = shlex.join(["python", "tools/roofline.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        record = roofline(scene(args), how(args), command)
    except DlxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines(record)))
    write(args.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
