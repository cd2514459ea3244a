"""How fast a forward is, against the time in which its weights can be read once on this device."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Hashable
from typing import Any

import torch

from dlx.bench.calls import touched
from dlx.bench.clock import forget_peak, intervals, peak_gib, spread, there, wait
from dlx.bench.prompts import first_block, prefill
from dlx.bench.rates import matmul_rate, read_rate
from dlx.bench.scene import Decoded, How, Scene, decode, floor_bytes, stand
from dlx.bench.trace import Trace, a_layer, trace
from dlx.provenance import provenance
from dlx.worker import Worker

SCHEMA = 2
WARM = 5  # forwards before those that are timed, at least one launch
LAUNCHES = 3  # that are timed at least
IDLE = (
    "share = 1 - device / wall: wall is the host's clock over launches as the engine sends them (plan, launch, harvest "
    "one launch behind), device the mean of the same forward replayed alone with no host in between, by device "
    "events; outside_share = 1 - launches / wall: launches is their time on the device by events around each, in the "
    "same stretch; both per forward"
)
HEAD_TWICE = (
    "a canvas' own policy, not a forced schedule; the floor counts the head once, though a forward reads it for the "
    "candidates and again for what their distributions expect to be embedded"
)


def latency(
    scene: Scene, how: How, steps: int, command: str, prefill_tokens: int = 0, first: bool = False
) -> dict[str, Any]:
    """One record: ms a forward, its floor and ratio, tokens per forward and per second, idle share, kernels, memory.

    steps           forwards timed, and at least three launches of a loop; 0 leaves decoding out
    prefill_tokens  prompt whose prefill is timed; 0 leaves it out
    first           whether to time a prompt of the scene's context up to its first committed block
    """
    began = time.monotonic()
    worker = scene.worker(how, longest(scene, how, steps, prefill_tokens))
    wait(worker.device)
    built_s = time.monotonic() - began
    with there(worker.device):
        record = measured(worker, scene, steps, prefill_tokens, first)
    return record | {"load_s": built_s, "made": provenance(command, worker.config.device)}


def measured(worker: Worker, scene: Scene, steps: int, prefill_tokens: int, first: bool) -> dict[str, Any]:
    """A record of latency without what came before the measurement."""
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "what": "latency",
        "scene": scene.describe(),
        "policy": worker.policy.describe(),
        "graphs": worker.config.graphs,
    }
    bandwidth = read_rate(worker.device)
    forget_peak(worker.device)
    if steps:
        record |= decoding(worker, scene, steps, bandwidth)
    record["read_gbps"] = bandwidth / 1e9
    record["prefill"] = record["first_block"] = None
    if prefill_tokens:
        record["prefill"] = prefill(worker, prefill_tokens, matmul_rate(worker.device))
    if first:
        record["first_block"] = first_block(worker, scene.context)
    record["peak_gib"] = peak_gib(worker.device)
    return record


def longest(scene: Scene, how: How, steps: int, prefill_tokens: int) -> int:
    """Tokens of the longest row: the longest stretch between two rewinds, or a prompt and what follows it."""
    launches = max(LAUNCHES, math.ceil(steps / how.forwards)) + 2
    canvas = scene.policy().canvas
    each = math.ceil(scene.block / canvas.steps) if canvas else min(scene.accept, scene.blocks * scene.block)
    stretch = each * (launches * how.forwards + WARM) if steps else each * how.forwards
    room = -(-(stretch + 4 * scene.block) // scene.block) * scene.block
    return max(scene.context, prefill_tokens) + room


@torch.no_grad()
def decoding(worker: Worker, scene: Scene, steps: int, bandwidth: float) -> dict[str, Any]:
    """What a stretch of decoding shows."""
    forwards = worker.config.forwards
    launches = max(LAUNCHES, math.ceil(steps / forwards)) if forwards > 1 else steps
    began = time.monotonic()
    at = stand(worker, scene)
    wait(worker.device)
    ready_s = time.monotonic() - began
    at.rewind()
    sent = intervals(at.launch, launches, worker.device, warm=max(1, WARM // forwards))
    tokens = (scene.requests * scene.context + at.reached()) // 2
    at.rewind()
    alone = intervals(at.turn, steps, worker.device, WARM) if forwards > 1 else sent
    at.rewind()
    some = min(8, math.ceil(scene.blocks * scene.block / scene.accept))  # forwards of a block, at most 8
    read = touched(at, max(1, some // forwards))
    need = floor_bytes(worker, tokens, scene.requests, None if read is None else read["mean"])
    done = decode(at, launches)
    at.rewind()
    found = trace(at.turn) if worker.device.type == "cuda" else None
    at.leave()
    return {
        **speed([ms / forwards for ms in sent], need, bandwidth),
        "experts_touched": read,
        "floor_note": HEAD_TWICE if worker.policy.canvas else None,
        "loop": loop(worker, at.key),
        "tokens_per_forward": done.tokens_per_forward,
        "tokens_per_s": done.tokens_per_forward * done.nfe / done.wall_s,
        "idle": idle(statistics.fmean(alone) if found else None, done, found),
        "host_syncs": done.syncs,
        "graphs_s": ready_s,
        **kernels(worker, at.key, found),
    }


def speed(ms: list[float], need: dict[str, int], bandwidth: float) -> dict[str, Any]:
    """Milliseconds a forward beside its floor: the bytes that it must read ÷ the bandwidth of the same run.

    Their mean counts: forwards in which a block commits take longer than the others (`graphs/either.py`).
    """
    times = {"mean": statistics.fmean(ms), **spread(ms)}
    floor_ms, with_kv_ms = need["weights"] / bandwidth * 1e3, sum(need.values()) / bandwidth * 1e3
    return {
        "ms_per_forward": times,
        "floor_bytes": need,
        "floor_ms": floor_ms,
        "ratio": times["mean"] / floor_ms,
        "floor_with_kv_ms": with_kv_ms,
        "ratio_with_kv": times["mean"] / with_kv_ms,
    }


def loop(worker: Worker, key: Hashable) -> dict[str, Any]:
    """How many forwards a launch may run, and by which route: one graph (while), or a graph a forward (unrolled)."""
    return {"forwards": worker.config.forwards, "route": worker.graphs.routes.get(key)}


def idle(alone_ms: float | None, done: Decoded, found: Trace | None) -> dict[str, Any]:
    """The share of the wall time in which the device had no forward to run; None where the host is the device."""
    wall_ms, launches_ms = (s * 1e3 / done.forwards for s in (done.wall_s, done.launches_s))
    return {
        "share": None if alone_ms is None else 1 - alone_ms / wall_ms,
        "outside_share": 1 - launches_ms / wall_ms,
        "device_ms": alone_ms,
        "launches_ms": launches_ms,
        "wall_ms": wall_ms,
        "gap_us": None if found is None else found.between_us(),
        "how": IDLE,
    }


def kernels(worker: Worker, key: Hashable, found: Trace | None) -> dict[str, Any]:
    """Kernels of a step by name, in all, and of one layer; None where there is no GPU to see them on.

    In a WHILE node one more asks whether to go on; the turn that is traced is no part of it.
    """
    if found is None:
        return {"kernels_per_step": None, "kernels_per_layer": None, "kernels": None}
    table, asks = found.table(), int(worker.graphs.routes.get(key) == "while")
    return {
        "kernels_per_step": sum(row["n"] for row in table) + asks,
        "kernels_per_layer": a_layer(table, worker.card.layers),
        "kernels": table,
    }
