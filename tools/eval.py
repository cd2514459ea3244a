"""Accuracy and tokens per forward of a model over the bundled tasks; a door to dlx.evals.

python tools/eval.py --json profiles/runs
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from dlx import LLM, DlxError
from dlx.evals import MAX_TOKENS, SEED, THRESHOLDS, evaluate, report, table
from dlx.provenance import place, provenance
from dlx.tasks import MIX, installed


def main() -> None:
    args = _arguments()
    tasks = list(args.tasks or installed(MIX))
    with LLM(
        args.model,
        policy=args.policy,
        graphs=args.graphs,
        device=args.device,
        dtype=args.dtype,
        block_length=args.block_length,
        kv_cache_dtype=args.kv_cache_dtype,
        max_num_seqs=args.max_num_seqs,
    ) as llm:
        records = evaluate(llm, tasks, args.n, args.thresholds, progress=sys.stderr.isatty())
        print(table(records))
        if args.json is None:
            return
        config = llm.config
        source = provenance(shlex.join(["python", *sys.argv]), config.device)
        pages = str(config.kv_dtype).removeprefix("torch.")
        how = {"device": config.device, "dtype": config.dtype, "kv_dtype": pages, "graphs": config.graphs}
        asked = {"tasks": tasks, "n": args.n, "seed": SEED, "max_tokens": MAX_TOKENS}
        value = report(records, model=config.model.name, policy=llm.policy, made=source, run=how, prompts=asked)
        path = args.json
        if path.suffix != ".json":
            path = place(path, config.model.name, args.policy, source)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", help="checkpoint folder; the bundled model if left out")
    add("--policy", default="single_bd", help="name of a decoding policy (default single_bd)")
    add("--thresholds", type=float, nargs="+", default=list(THRESHOLDS), help="confidences to accept at")
    add("--n", type=int, default=100, help="held-out prompts a task (default 100)")
    add("--tasks", nargs="+", help=f"tasks, in order (default {' '.join(MIX)})")
    add("--device", help="cpu or cuda")
    add("--dtype", help="float32 or bfloat16")
    add("--graphs", help="off, compile or capture")
    add("--block-length", type=int, help="tokens a block, of those the model was trained for")
    add("--kv-cache-dtype", help="of K/V pages: bf16, fp8_e4m3 or fp8_e5m2; the model's if left out")
    add("--max-num-seqs", type=int, default=32, help="prompts that decode at once (default 32)")
    add(
        "--json",
        type=Path,
        help="write the record: a .json file, or a folder like profiles/runs",
    )
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except DlxError as error:
        raise SystemExit(f"error: {error}") from None
