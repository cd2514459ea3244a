"""Accuracy against tokens per forward of policies on the bundled tasks; a door to dlx.frontier.

python tools/frontier.py --json profiles/runs/GPU/tiny--frontier.json --png profiles/runs/GPU/tiny--frontier.png
python tools/frontier.py edit dmax:accept=0.5|0.7 --json FILE    adds these points to the file, or takes their place
python tools/frontier.py --only-draw --json FILE --png FILE      draws again, and rewrites the README's table
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from dlx import LLM, DlxError
from dlx.errors import ConfigError
from dlx.evals import MAX_TOKENS, SEED
from dlx.frontier import LINES, THRESHOLDS, Json, described, draw, joined, line, markdown, measure, report
from dlx.provenance import provenance
from dlx.tasks import MIX, installed

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- frontier:begin, by tools/frontier.py -->\n", "<!-- frontier:end -->"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write, draw. → 0"""
    args = _arguments(argv)
    tasks = list(args.tasks or installed(MIX))
    asked = {"tasks": tasks, "n": args.n, "seed": SEED, "max_tokens": MAX_TOKENS}
    kept: Json = json.loads(args.json.read_text()) if args.json is not None and args.json.exists() else {}
    if kept and kept["prompts"] != asked and not args.only_draw:
        raise ConfigError(f"{args.json} holds lines over other prompts, {kept['prompts']}; name another file")
    lines: dict[str, Json] = kept.get("lines", {})
    wanted = [] if args.only_draw else [line(text, args.thresholds) for text in args.lines or LINES]
    record = kept
    for one in wanted:
        build = _builder(args)
        records = measure(one, build, tasks, args.n, lambda text: print(text, flush=True))
        made = provenance(shlex.join(["python", *sys.argv]), args.device or "cpu")
        lines[one.name] = joined(lines.get(one.name), described(one, records, made))
        record = report(lines, model=Path(args.model or "tiny").name, prompts=asked)
        if args.json is not None:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(record, indent=1) + "\n")
    print(markdown(record), end="")
    if args.png is not None:
        draw(record, args.png)
    if args.readme:
        head, rest = README.read_text().split(BEGIN)
        README.write_text(f"{head}{BEGIN}{markdown(record)}{END}{rest.split(END)[1]}")
    return 0


def _builder(args: argparse.Namespace):
    return lambda policy: LLM(
        args.model,
        policy=policy,
        graphs=args.graphs,
        device=args.device,
        dtype=args.dtype,
        max_num_seqs=args.max_num_seqs,
        max_model_len=args.max_model_len,
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("lines", nargs="*", help=f"NAME or NAME:FIELD=VALUE|VALUE,… (default {' '.join(LINES)})")
    add("--thresholds", type=float, nargs="+", default=list(THRESHOLDS), help="what `accept` is swept over")
    add("--n", type=int, default=100, help="held-out prompts a task (default 100)")
    add("--tasks", nargs="+", help=f"tasks, in order (default {' '.join(MIX)})")
    add("--model", help="checkpoint folder; the bundled model if left out")
    add("--device", help="cpu or cuda")
    add("--dtype", help="float32 or bfloat16")
    add("--graphs", help="off, compile or capture")
    add("--max-num-seqs", type=int, default=32, help="prompts that decode at once (default 32)")
    add("--max-model-len", type=int, help="tokens of prompt and answer")
    add("--json", type=Path, help="the record; points that it has already stay in it")
    add("--png", type=Path, help="the plot; needs matplotlib")
    add("--readme", action="store_true", help="write the table into the README")
    add("--only-draw", action="store_true", help="measure nothing: draw what --json holds")
    args = parser.parse_args(argv)
    if args.only_draw and (args.json is None or not args.json.exists()):
        parser.error("--only-draw draws what --json FILE holds; name a file that is there")
    return args


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except DlxError as error:
        raise SystemExit(f"error: {error}") from None
