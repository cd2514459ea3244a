"""The server under load, and what it costs beside the engine; a door to dlx.bench.storm and dlx.bench.overhead.

python tools/load.py storm [--clients 200] [--seconds 60] [--json FILE]  a server of its own, over the bundled model
python tools/load.py overhead [--streams 1 64] [--json FILE]             microseconds of CPU time a streamed chunk
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import psutil

from dlx import LLM, SamplingParams
from dlx.bench.overhead import overhead
from dlx.bench.storm import Question, metric, storm
from dlx.llm import Prompt
from dlx.provenance import provenance
from dlx.tasks import MIX, installed, sample

Json = dict[str, Any]
MAX_TOKENS = 48
WARM_S = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. → 0, or 1 if an answer was lost or wrong"""
    args = _arguments(argv)
    record = _storm(args) if args.what == "storm" else _overhead(args)
    text = json.dumps({**provenance(f"python tools/load.py {shlex.join(sys.argv[1:])}", "cpu"), **record}, indent=1)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")
    return int(any(record.get(bad) for bad in ("failed", "lost", "wrong")))


def _overhead(args: argparse.Namespace) -> Json:
    return {"overhead": [overhead(streams, args.chunks, args.rounds) for streams in args.streams]}


def _storm(args: argparse.Namespace) -> Json:
    questions = _questions(args.questions)
    command = [
        sys.executable,
        "-m",
        "dlx.cli",
        "serve",
        "--port",
        "0",
        "--device",
        "cpu",
        "--max-num-seqs",
        str(args.rows),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            url, process = _address(server.stderr), psutil.Process(server.pid)

            def look() -> Json:
                with urllib.request.urlopen(f"{url}/metrics", timeout=30) as page:
                    text = page.read().decode()
                names = ("waiting", "running")
                return {
                    **{name: metric(text, f"dlx_requests_{name}") for name in names},
                    "pages_used": metric(text, 'dlx_kv_pages{state="used"}'),
                    "rss_mib": round(process.memory_info().rss / 2**20, 1),
                    "files": process.num_fds(),
                    "threads": process.num_threads(),
                }

            asyncio.run(storm(url, questions, args.clients, WARM_S, look, MAX_TOKENS))
            before = look()
            record = asyncio.run(storm(url, questions, args.clients, args.seconds, look, MAX_TOKENS))
            after = look()
            server.send_signal(signal.SIGTERM)
            return {**record, "rows": args.rows, "before": before, "after": after, "exit": server.wait(60)}
        finally:
            server.kill()


def _questions(n: int) -> list[Question]:
    """Questions of the bundled tasks, all different, with what the model answers alone."""
    rng, mix, texts = Random(1), installed(MIX), dict[str, None]()
    while len(texts) < n:
        texts[sample(rng, mix, want_held=True).prompt] = None
    with LLM(device="cpu", max_num_seqs=1) as llm:
        chats: list[Prompt] = [[{"role": "user", "content": text}] for text in texts]
        return [Question(t, o.text) for t, o in zip(texts, llm.generate(chats, SamplingParams(max_tokens=MAX_TOKENS)))]


def _address(lines: Any) -> str:
    url = ""
    for line in lines:
        found = re.search(r"listening at (\S+);", line)
        url = found[1] if found else url
        if "ready" in line:
            return url
    raise SystemExit("the server did not start")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("storm", "overhead"))
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--questions", type=int, default=100, help="different ones")
    parser.add_argument("--rows", type=int, default=32, help="requests that decode at once")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--chunks", type=int, default=500, help="of each stream")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
