"""Measure a step on a GPU: python tools/bench.py latency --shape sdar-8b --block 4 --context 1024 --accept 4"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from dlx.bench import Scene, latency
from dlx.errors import DlxError

SHAPES = Path(__file__).parent / "shapes"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    sub = parser.add_subparsers(dest="what", required=True)
    one = sub.add_parser("latency", help="ms per forward against the floor, at a forced schedule")
    one.add_argument("--shape", default="sdar-8b", help=f"a name of {SHAPES.name}/, or a checkpoint's folder")
    one.add_argument("--block", type=int, default=4, help="tokens a block")
    one.add_argument("--blocks", type=int, default=1, help="blocks of a row that decode at once")
    one.add_argument("--context", type=int, default=1024, help="tokens before the answer")
    one.add_argument("--requests", type=int, default=1)
    one.add_argument("--accept", type=int, default=4, help="tokens accepted a forward")
    one.add_argument("--graphs", default="capture", choices=["off", "compile", "capture"])
    one.add_argument("--steps", type=int, default=64, help="forwards timed")
    one.add_argument("--json", type=Path, help="write the record there")
    args = parser.parse_args()
    named = SHAPES / f"{args.shape}.json"
    shape = named if named.is_file() else Path(args.shape)
    try:
        record = latency(
            Scene(shape, args.block, args.context, args.requests, args.accept, args.blocks),
            args.graphs,
            args.steps,
            shlex.join(["python", *sys.argv]),
        )
    except DlxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    ms = record["ms_per_forward"]
    print(
        f"{shape.stem} block {args.block}: {ms['p50']:.3f} ms a forward (p99 {ms['p99']:.3f}), "
        f"floor {record['floor_ms']:.3f} ms, ratio {record['ratio']:.3f}; "
        f"{record['tokens_per_forward']:.2f} tokens per forward, {record['tokens_per_s']:.0f} tok/s, "
        f"wall {record['wall_ms_per_step']:.3f} ms a step, {record['kernels_per_step']:.0f} kernels; "
        f"read {record['read_gbps']:.0f} GB/s; load {record['load_s']:.0f} s, graphs {record['graphs_s']:.0f} s, "
        f"peak {record['peak_gib']:.1f} GiB"
    )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
