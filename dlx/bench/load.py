"""Many requests through the engine, from their arrival together until the last is done."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

from dlx.bench.calls import touched
from dlx.bench.clock import Replays, counted_syncs, forget_peak, peak_gib, there, wait
from dlx.bench.forward import SCHEMA, kernels, loop, speed
from dlx.bench.prompts import matrices, prefill_flops
from dlx.bench.rates import matmul_rate, read_rate
from dlx.bench.scene import How, Scene, floor_bytes, prompts, stand
from dlx.bench.trace import trace
from dlx.provenance import provenance
from dlx.request import Request, SamplingParams

if TYPE_CHECKING:
    from dlx.engine import Engine
    from dlx.worker import Worker

ROOF = (
    "least_s: the larger of bytes / read_gbps and operations / matmul_tflops of prompts and of forwards, each as a "
    "whole; bytes are every weight but an input table once a forward, and in decoding the K/V of the rows; operations "
    "are of each prompt, of L positions a forward of a row with the head, and of L without it a committed block"
)
IDLE = "1 - (prefill + decode) / wall: wall is the host's clock, the others the time of their graphs by device events"


class Run(NamedTuple):
    """What it took to serve all requests."""

    requests: list[Request]
    replays: Replays
    launched: list[int]  # forwards of each launch that was read
    wall_s: float
    syncs: int | None


def throughput(scene: Scene, how: How, max_tokens: int, rows: int | None, command: str) -> dict[str, Any]:
    """One record: tokens a second, tokens per forward, ms a forward, and where the time went.

    max_tokens  of each request
    rows        requests that decode at once; None is all
    """
    rows = rows or scene.requests
    began = time.monotonic()
    engine = scene.engine(how, scene.context + max_tokens, rows)
    worker = engine.worker
    wait(worker.device)
    built_s = time.monotonic() - began
    with there(worker.device):
        record = measured(engine, scene, max_tokens, rows)
    return record | {"load_s": built_s, "made": provenance(command, worker.config.device)}


def measured(engine: Engine, scene: Scene, max_tokens: int, rows: int) -> dict[str, Any]:
    """A record of throughput without what came before the measurement."""
    worker = engine.worker
    bandwidth = read_rate(worker.device)
    forget_peak(worker.device)
    began = time.monotonic()
    serve(engine, scene, min(max_tokens, 2 * scene.block))  # makes the graphs
    ready_s = time.monotonic() - began
    busy = min(rows, scene.requests)
    read = None
    if worker.card.mixture:
        at = stand(worker, scene._replace(requests=busy))
        read = touched(at, 1)
        at.leave()
        worker.discard()
    run = serve(engine, scene, max_tokens)
    tokens, nfe = sum(len(r.out) for r in run.requests), sum(r.nfe for r in run.requests)
    steps = run.replays.ms("step")[: len(run.launched)]  # one more may have been sent when the last request ended
    prefill_s, decode_s = sum(run.replays.ms("prefill")) / 1e3, sum(steps) / 1e3
    each = [ms / n for ms, n in zip(steps, run.launched, strict=True) if n]
    key = next(key for key in reversed(run.replays.keys) if isinstance(key, tuple) and key[0] == "step")
    found = trace(lambda: worker.graphs.turn(key)) if worker.device.type == "cuda" else None
    need = floor_bytes(worker, busy * (scene.context + max_tokens // 2), busy, None if read is None else read["mean"])
    return {
        "schema": SCHEMA,
        "what": "throughput",
        "scene": scene.describe() | {"max_tokens": max_tokens, "rows": rows},
        "policy": worker.policy.describe(),
        "graphs": worker.config.graphs,
        "loop": loop(worker, key),
        **speed(each, need, bandwidth),
        "experts_touched": read,
        "read_gbps": bandwidth / 1e9,
        "roof": roof(worker, scene, run, need, bandwidth, matmul_rate(worker.device)),
        "tokens": tokens,
        "nfe": nfe,
        "forwards": sum(run.launched),
        "tokens_per_forward": tokens / nfe,
        "tokens_per_s": tokens / run.wall_s,
        "wall_s": run.wall_s,
        "prefill_s": prefill_s,
        "decode_s": decode_s,
        "idle": {
            "share": 1 - (prefill_s + decode_s) / run.wall_s,
            "s": run.wall_s - prefill_s - decode_s,
            "gap_us": found.between_us() if found else None,
            "how": IDLE,
        },
        "host_syncs": run.syncs,
        "graphs_s": ready_s,
        **kernels(worker, key, found),
        "peak_gib": peak_gib(worker.device),
    }


def roof(worker: Worker, scene: Scene, run: Run, need: dict[str, int], bandwidth: float, rate: float) -> dict[str, Any]:
    """Seconds that the run's prompts and forwards need at the roof that binds each, and their share of the wall time.

    need       bytes of a forward
    bandwidth  bytes a second
    rate       operations a second
    """
    card, L = worker.card, worker.L
    asks, commits = sum(r.nfe for r in run.requests), sum(len(r.out) for r in run.requests) / L
    keys = scene.context + len(run.requests[0].out) / 2
    seen = 4 * card.heads * sum(D for _, D in card.kv) * keys
    layers, head = 2 * matrices(worker) + seen, 2 * card.hidden * card.vocab
    begun = sum(prefill_flops(worker, scene.context).values()) * scene.requests
    weights = sum(p.nbytes for name, p in worker.net.named_parameters() if name.startswith("layers."))
    decode = L * (asks * (layers + head) + commits * layers)
    times = {
        "prefill": (len(run.replays.ms("prefill")) * weights / bandwidth, begun / rate),
        "decode": (sum(run.launched) * sum(need.values()) / bandwidth, decode / rate),
    }
    least_s = sum(map(max, times.values()))
    return {
        "memory_s": {name: memory for name, (memory, _) in times.items()},
        "compute_s": {name: compute for name, (_, compute) in times.items()},
        "matmul_tflops": rate / 1e12,
        "least_s": least_s,
        "share": least_s / run.wall_s,
        "how": ROOF,
    }


def serve(engine: Engine, scene: Scene, max_tokens: int) -> Run:
    """All requests of the scene through the engine."""
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=0)
    ids = prompts(engine.worker.card, scene.requests, scene.context)
    launched: list[int] = []
    wait(engine.worker.device)
    with Replays(engine.worker) as replays, counted_syncs(engine.worker.device) as syncs:
        began = time.monotonic()
        engine.add_all([(prompt, params) for prompt in ids])
        requests = list(engine.scheduler.waiting)
        while not engine.idle:
            before = [r.nfe for r in requests]
            read = engine.worker.read
            engine.step()  # reads one launch at most, but for the last
            spent = max(r.nfe - b for r, b in zip(requests, before, strict=True))
            if engine.worker.read > read:
                launched.append(spent)  # 0: sent before it was known that all its rows had ended
        wall_s = time.monotonic() - began
    return Run(requests, replays, launched, wall_s, syncs.n)
