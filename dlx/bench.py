"""How fast a step is, against the time in which its weights can be read once on this device.

Weights are random, of the true shape; acceptance is forced (policy `fixed`), so tokens per forward are a choice here,
not a quality. A forward is one replay of the captured step, timed by device events; the floor is the bytes that every
forward must read divided by the read bandwidth measured in the same run.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dlx import weights
from dlx.config import Config
from dlx.errors import ConfigError
from dlx.graphs.policies import named
from dlx.graphs.rules import Fixed
from dlx.ops.bench import read_bandwidth, timed
from dlx.pages import PagePool
from dlx.provenance import provenance
from dlx.request import Request, SamplingParams
from dlx.scheduler import Scheduler
from dlx.worker import Worker

GB = 1e9


class Scene(NamedTuple):
    """What is measured: a shape at a block length, requests that stand at a context, a forced schedule."""

    shape: Path  # a folder with config.json, or the file itself
    block: int
    context: int
    requests: int
    accept: int
    blocks: int = 1  # that may decode at once

    def worker(self, graphs: str, max_new: int) -> Worker:
        """A worker with random weights of the shape."""
        source = self.shape / "config.json" if self.shape.is_dir() else self.shape
        if not source.is_file():
            raise ConfigError(f"{source} is not there; name a shape of tools/shapes, or a checkpoint's folder")
        raw = weights.read_json(source) | {"block_size": self.block}
        raw = {k: v for k, v in raw.items() if k not in ("block_length", "trained_block_lengths")}
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(raw))
            policy = replace(named("fixed"), N=self.blocks, select=Fixed(self.accept))
            config = Config.from_args(
                folder, policy, graphs, load_format="dummy", max_num_seqs=self.requests,
                max_model_len=self.context + max_new,
            )  # fmt: skip
            return Worker(config)

    def describe(self) -> dict[str, Any]:
        return {**self._asdict(), "shape": self.shape.stem}


def floor_bytes(worker: Worker, scene: Scene) -> dict[str, int]:
    """Bytes that a forward must read: every weight but the embedding table once, and the K/V of the contexts."""
    net, card = worker.net, worker.card
    table = 0 if card.tied else int(net.table.nbytes)
    read = sum(int(p.nbytes) for p in net.parameters()) - table
    token = 2 * card.layers * card.kv_heads * card.head_dim * worker.config.torch_dtype.itemsize
    return {"weights": read, "kv": scene.requests * scene.context * token}


def latency(scene: Scene, graphs: str, steps: int, command: str) -> dict[str, Any]:
    """One record: ms a forward, its floor and ratio, tokens per forward and per second, kernels, memory."""
    began = time.monotonic()
    forwards = 2 * steps + 64  # timed, decoded and profiled ones, and some to spare
    worker = scene.worker(graphs, max_new=scene.accept * forwards + 4 * scene.block)
    built_s = time.monotonic() - began
    bandwidth = read_bandwidth(worker.device)
    torch.cuda.reset_peak_memory_stats()
    scheduler = stand(worker, scene)
    key = ("step", worker.shapes.rows[-1])
    ready_s = time.monotonic() - began - built_s
    replays = timed(lambda: worker.graphs.replay(key), steps)
    tokens, nfe, wall_s = decode(worker, scheduler, steps)
    table = kernels(worker, key)
    need = floor_bytes(worker, scene)
    ms = statistics.median(replays)
    floor_ms = need["weights"] / bandwidth * 1e3
    return {
        "schema": 1,
        "scene": scene.describe(),
        "policy": worker.policy.describe(),
        "graphs": graphs,
        "ms_per_forward": {"p50": ms, "p99": sorted(replays)[int(0.99 * len(replays))], "n": len(replays)},
        "floor_ms": floor_ms,
        "ratio": ms / floor_ms,
        "floor_with_kv_ms": sum(need.values()) / bandwidth * 1e3,
        "read_gbps": bandwidth / GB,
        "floor_bytes": need,
        "tokens_per_forward": tokens / nfe,
        "tokens_per_s": tokens / wall_s,
        "wall_ms_per_step": wall_s / steps * 1e3,
        "load_s": built_s,
        "graphs_s": ready_s,
        "kernels_per_step": sum(row["n"] for row in table),
        "kernels": table,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "made": provenance(command, worker.config.device),
    }


def stand(worker: Worker, scene: Scene) -> Scheduler:
    """Admit the requests, so that every row decodes behind `context` tokens; their K/V is random, not prefilled."""
    pool = PagePool(worker.num_pages)
    scheduler = Scheduler(worker.policy, worker.card, worker.shapes, pool, worker.max_len)
    rng = random.Random(0)
    ids = [i for i in range(min(worker.card.vocab, 1000)) if i != worker.card.mask_id]
    for n in range(scene.requests):
        params = SamplingParams(max_tokens=worker.max_len - scene.context, ignore_eos=True)
        scheduler.add(Request(n, rng.choices(ids, k=scene.context), params, time.monotonic()))
    plan = scheduler.plan()
    assert plan is not None and len(plan.running) == scene.requests
    for pages in worker.kv:
        pages.normal_()
    worker.launch(plan._replace(prefill=[]))
    scheduler.take(*pair(worker))
    return scheduler


def decode(worker: Worker, scheduler: Scheduler, steps: int) -> tuple[int, int, float]:
    """(tokens, forwards, seconds) of `steps` launches as the engine runs them: one overlaps, none waits."""
    turn(worker, scheduler)
    turn(worker, scheduler)  # the host's counts are the device's again
    before = sum(r.nfe for r in scheduler.running.values())
    began = time.monotonic()
    tokens = sum(turn(worker, scheduler) for _ in range(steps))
    wall_s = time.monotonic() - began
    return tokens, sum(r.nfe for r in scheduler.running.values()) - before, wall_s


def turn(worker: Worker, scheduler: Scheduler) -> int:
    """Send one launch, read the one before; tokens that it committed."""
    plan = scheduler.plan()
    assert plan is not None, "the requests must outlast the measurement"
    worker.launch(plan)
    return sum(len(ids) for _, ids in scheduler.take(*pair(worker))) if worker.in_flight > 1 else 0


def kernels(worker: Worker, key: tuple[str, int], steps: int = 8) -> list[dict[str, Any]]:
    """Kernels of one replay by name, the costliest first: launches and microseconds a step."""
    from torch.profiler import ProfilerActivity, profile

    worker.graphs.replay(key)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(steps):
            worker.graphs.replay(key)
        torch.cuda.synchronize()
    rows = [
        {"name": e.key[:120], "n": e.count / steps, "us": e.self_device_time_total / steps}
        for e in seen.key_averages()
        if e.self_device_time_total > 0
    ]
    return sorted(rows, key=lambda row: -row["us"])


def pair(worker: Worker) -> tuple[dict[int, Request], list[Any]]:
    """The oldest launch as `Scheduler.take` wants it."""
    plan, replies = worker.harvest()
    return plan.running, replies
