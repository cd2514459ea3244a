"""What it takes to begin: the prefill of a prompt, and the time to its first committed block."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch

from dlx.bench.clock import Replays, spread, wait
from dlx.bench.scene import prompts, schedule, taken
from dlx.errors import ConfigError
from dlx.request import Request, SamplingParams
from dlx.scheduler import Scheduler
from dlx.worker import Worker

TIMES = 5  # prompts that are timed, after one that makes the graphs


class Begun(NamedTuple):
    """One prompt up to its first committed block."""

    prefill_ms: float  # on the device
    wall_ms: float  # on the host, from the plan to the ids
    nfe: int  # denoise forwards until then
    prefills: int


def prefill(worker: Worker, tokens: int, rate: float) -> dict[str, Any]:
    """Milliseconds on the device of the prefill of a prompt, and its share of the matmul rate."""
    done = begun(worker, tokens)
    times = spread([b.prefill_ms for b in done])
    work = prefill_flops(worker, tokens)
    per_s = sum(work.values()) / times["p50"] * 1e3
    return {
        "tokens": tokens,
        "forwards": done[0].prefills,
        "ms": times,
        "flops": work,
        "tflops": per_s / 1e12,
        "matmul_tflops": rate / 1e12,
        "of_matmul_rate": per_s / rate,
    }


def first_block(worker: Worker, tokens: int) -> dict[str, Any]:
    """Milliseconds on the host's clock from a prompt's plan to the ids of its first committed block."""
    done = begun(worker, tokens)
    return {
        "prompt_tokens": tokens,
        "ms": spread([b.wall_ms for b in done]),
        "prefill_ms": spread([b.prefill_ms for b in done]),
        "forwards": done[0].nfe,
    }


@torch.no_grad()
def begun(worker: Worker, tokens: int) -> list[Begun]:
    """Prompts one after the other, each dropped once its first block is committed; the first is not counted."""
    scheduler = schedule(worker)
    if tokens < worker.L:
        raise ConfigError(f"a prompt of {tokens} tokens has no complete block of {worker.L}; use a longer one")
    asked = enumerate(prompts(worker.card, TIMES + 1, tokens))
    return [_begun(worker, scheduler, n, prompt) for n, prompt in asked][1:]


def _begun(worker: Worker, scheduler: Scheduler, n: int, prompt: list[int]) -> Begun:
    params = SamplingParams(max_tokens=worker.max_len - len(prompt), ignore_eos=True, seed=0)
    request = Request(n, prompt, params, time.monotonic())
    scheduler.check(request)
    lag = 1 if worker.device.type == "cuda" else 0  # as the engine reads its launches
    wait(worker.device)
    with Replays(worker) as replays:
        began = time.monotonic()
        scheduler.add(request)
        while not request.out:
            plan = scheduler.plan()
            assert plan is not None, "a request that fits alone is admitted alone"
            worker.launch(plan)
            while worker.in_flight > lag:
                taken(worker, scheduler)
        wall_ms = (time.monotonic() - began) * 1e3
    slot = scheduler.abort(n)
    if slot is not None:
        worker.stop(slot)
    worker.discard()
    return Begun(sum(replays.ms("prefill")), wall_ms, request.nfe, request.prefills)


def prefill_flops(worker: Worker, tokens: int) -> dict[str, int]:
    """Operations that the prefill of a prompt's complete blocks needs: its matmuls without a head, and visible keys."""
    card, L = worker.card, worker.L
    blocks = tokens // L
    matrices = sum(p.numel() for layer in worker.net.layers for p in layer.parameters() if p.dim() == 2)
    visible = L * L * blocks * (blocks + 1) // 2  # a position sees its own block and all before it
    return {
        "matmuls": 2 * blocks * L * matrices,
        "attention": 4 * visible * card.heads * sum(D for _, D in card.kv),
    }
