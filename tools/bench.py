"""Measure on a GPU, or smaller on a CPU, against the floor of the same run:

python tools/bench.py latency --shape sdar-8b --block 4 --context 1024 --accept 4 [--forwards 64] [--prefill 2048]
python tools/bench.py throughput --shape sdar-8b --block 32 --requests 16 --context 512 --max-tokens 256
python tools/bench.py startup --shape sdar-8b --buckets 1,8,32 --prefill 2048
python tools/bench.py invariance --shape sdar-8b --block 4 --requests 32 --context 256 --n 200
python tools/bench.py policies --shape sdar-8b --block 16 --json FILE [NAME …]     adds to the runs in FILE
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from dlx.bench import invariance, latency, startup, throughput
from dlx.bench.arguments import add_how, add_scene, how, scene, write
from dlx.bench.policies import policies, table
from dlx.bench.report import sentence
from dlx.bench.start import STARTS
from dlx.errors import DlxError


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="what", required=True)
    one = sub.add_parser("latency", help="ms per forward against the floor, at a forced schedule")
    one.add_argument("--steps", type=int, default=64, help="forwards timed; 0 leaves decoding out")
    one.add_argument("--prefill", type=int, default=0, metavar="T", help="also time the prefill of T tokens")
    one.add_argument("--first-block", action="store_true", help="also time a --context prompt to its first block")
    many = sub.add_parser("throughput", help="requests through the engine until all are done")
    many.add_argument("--max-tokens", type=int, default=256, help="of each request")
    many.add_argument("--rows", type=int, help="requests that decode at once; else all")
    start = sub.add_parser("startup", help="seconds until graphs can be replayed, cold and packed")
    start.add_argument("--buckets", type=numbers, default=[1, 8, 32], help="rows of the steps: 1,8,32")
    start.add_argument("--prefill", type=int, default=2048, metavar="T", help="tokens of the prefill graph; 0 is none")
    start.add_argument("--policy", default="single_bd")
    start.add_argument("--only", choices=STARTS, help="else both")
    start.add_argument("--pack", type=Path, help="a pack that is there already; else one is written")
    same = sub.add_parser("invariance", help="whether requests get the same tokens alone as in batches of --requests")
    same.add_argument("--n", type=int, default=200, help="requests in all")
    same.add_argument("--max-tokens", type=int, default=32, help="of the longest answer")
    rules = sub.add_parser("policies", help="what each policy's rules cost a forward, beside a forced schedule")
    rules.add_argument("names", nargs="*", metavar="NAME", help="policies; else all that are not in --json")
    rules.add_argument("--rounds", type=int, default=200, help="forwards timed of each policy")
    for each in (one, many, start, same, rules):
        add_scene(each)
        add_how(each)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    command = shlex.join(["python", "tools/bench.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        where = scene(args)
        if args.what == "policies":
            before = json.loads(args.json.read_text())["runs"] if args.json and args.json.is_file() else None
            for record in policies(where, how(args), args.names, args.rounds, command, before):
                write(args.json, record)
                before = record["runs"]
            print(table(before or {}))
            return 0
        if args.what == "latency":
            record = latency(where, how(args), args.steps, command, args.prefill, args.first_block)
        elif args.what == "throughput":
            record = throughput(where, how(args), args.max_tokens, args.rows, command)
        elif args.what == "invariance":
            record = invariance(where, how(args), args.n, args.max_tokens, command)
        else:
            starts = [args.only] if args.only else STARTS
            record = startup(where, how(args), args.buckets, args.prefill, args.policy, command, starts, args.pack)
    except DlxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(sentence(record))
    write(args.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
