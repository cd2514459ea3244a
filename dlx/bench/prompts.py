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
    ids: list[int]  # that were committed


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
    if tokens - worker.card.shift < worker.step:
        raise ConfigError(f"a prompt of {tokens} tokens has no complete block of {worker.step}; use a longer one")
    asked = enumerate(prompts(worker.card, TIMES + 1, tokens))
    return [_begun(worker, scheduler, n, prompt) for n, prompt in asked][1:]


@torch.no_grad()
def answered(worker: Worker, prompt: int, tokens: int) -> Begun:
    """A prompt of random ids and an answer of so many tokens, to its end."""
    (ids,) = prompts(worker.card, 1, prompt)
    return _begun(worker, schedule(worker), 0, ids, tokens)


def _begun(worker: Worker, scheduler: Scheduler, n: int, prompt: list[int], tokens: int | None = None) -> Begun:
    params = SamplingParams(max_tokens=tokens or worker.max_len - len(prompt), ignore_eos=True, seed=0)
    request = Request(n, prompt, params, time.monotonic())
    scheduler.check(request)
    lag = 1 if worker.device.type == "cuda" else 0  # as the engine reads its launches
    wait(worker.device)
    with Replays(worker) as replays:
        began = time.monotonic()
        scheduler.add(request)
        while request.finish is None and (tokens or not request.out):
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
    return Begun(sum(replays.ms("prefill")), wall_ms, request.nfe, request.prefills, request.out)


def prefill_flops(worker: Worker, tokens: int) -> dict[str, int]:
    """Operations that the prefill of a prompt needs: its matmuls without a head, with K experts, and visible keys."""
    card, L, gemma = worker.card, worker.step, worker.card.gemma
    n = tokens if worker.policy.full else (tokens - card.shift) // L * L
    visible = n * n if worker.policy.full else n * (n + L) // 2  # all, or its own block and all before it
    seen = [visible] * card.layers
    if gemma is not None:
        near = min(n, gemma.window)
        seen = [visible if wide else near * (near + 1) // 2 + (n - near) * near for wide in gemma.everywhere]
    return {
        "matmuls": 2 * n * matrices(worker),
        "attention": 4 * card.heads * sum(keys * D for keys, (_, D) in zip(seen, card.kv, strict=True)),
    }


def matrices(worker: Worker) -> int:
    """Numbers in the matrices that a position meets, without the head; of experts the K that are chosen."""
    m = worker.card.mixture
    named = [(k, p) for k, p in worker.net.named_parameters() if k.startswith("layers.") and not k.endswith("_scale")]
    found = sum(p.numel() for _, p in named if p.dim() == 2)
    if m is not None:  # a shared expert that lies among the others is one more
        found += sum(p.numel() // len(p) * (m.active + m.joined) for _, p in named if p.dim() == 3)
    return found
