"""The training loop: rows in, steps, a state file to go on from, an exported checkpoint, its evaluation."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dlx import LLM
from dlx.errors import EngineError
from dlx.evals import THRESHOLDS, evaluate, report, table
from dlx.provenance import provenance
from tools.tiny.export import export
from tools.tiny.noise import Rows, block_mask, corrupt, dense_mask
from tools.tiny.objective import Layers, masked_rows, own_guesses, recover, target
from tools.tiny.recipe import Recipe
from tools.tiny.rows import Packed, Packing, Workers
from tools.tiny.state import Model, Progress, save, start

log = logging.getLogger(__name__)

LOG_EVERY_S = 10.0
RESERVE_S = 20.0  # of a call's time, left for saving and exporting


class Call(NamedTuple):
    """What one call of the trainer may use, and where it writes.

    out      folder of the checkpoint, train.log and eval.json
    state    file to resume from, if it is there, and to save to
    init     checkpoint folder whose weights and tokenizer to start from; a state file wins over it
    minutes  wall time of this call
    """

    out: Path
    state: Path
    init: Path | None
    device: torch.device
    minutes: float
    workers: int
    eval_n: int
    eval_every_minutes: float
    command: str


class Draws(NamedTuple):
    """The two sources of randomness of a call."""

    host: Random
    device: torch.Generator


def train(recipe: Recipe, call: Call) -> bool:
    """Train until the recipe's or the call's time is over, save, export; if done, evaluate. → done"""
    recipe.check()
    started = time.monotonic()
    call.out.mkdir(parents=True, exist_ok=True)
    model = start(recipe, call.state, call.init, call.device)
    model.tokenizer.save(str(call.out / "tokenizer.json"))
    progress = model.progress
    progress.calls += 1
    seed = recipe.seed + 1000 * progress.calls
    packing = Packing(recipe.mix, recipe.blocks, recipe.rows, recipe.row_tokens)
    workers = Workers(call.out / "tokenizer.json", packing, seed, call.workers)
    try:
        _loop(recipe, call, model, workers, started + call.minutes * 60 - RESERVE_S, seed)
    finally:
        workers.close()
    save(model, call.state)
    export(model.network, model.tokenizer, list(recipe.blocks), call.out)
    done = progress.used_s >= recipe.minutes * 60
    log.info(
        "exported to %s: step %d, %.1f M clean tokens, %.2f of %g minutes trained%s",
        *(call.out, progress.step, progress.tokens / 1e6, progress.used_s / 60, recipe.minutes),
        "" if done else "; not done: run the same command again",
    )
    if done:
        score(recipe, call, THRESHOLDS, call.eval_n)
    return done


def score(recipe: Recipe, call: Call, thresholds: Sequence[float], n: int) -> None:
    """Evaluate the exported checkpoint through dlx; the record goes to eval.json."""
    with LLM(call.out, device=call.device.type, graphs="off", max_num_seqs=64) as llm:
        records = evaluate(llm, list(recipe.mix), n, thresholds)
        log.info("evaluation, accuracy and tokens per forward:\n%s", table(records))
        made = provenance(call.command, call.device.type)
        value = report(records, model=call.out.name, policy=llm.policy, made=made, n=n)
    (call.out / "eval.json").write_text(json.dumps(value, indent=1) + "\n")


def step(recipe: Recipe, model: Model, layers: Layers, rows: Rows, share: float, draws: Draws) -> dict[str, Tensor]:
    """One update at this share of the training time; → what to log, each a scalar."""
    network = model.network
    on_gpu = rows.ids.is_cuda
    rate = recipe.rate(model.progress.step, share)
    model.muon.lr = rate
    for group in model.adamw.param_groups:
        group["lr"] = rate
    noise = corrupt(rows, recipe.group_blocks, recipe.group_share, draws.device)
    mask = (block_mask if on_gpu else dense_mask)(rows.doc, noise.block, noise.group)
    goal, noisy = target(rows, noise, recipe.weight_power), masked_rows(rows, noise)
    with _autocast(on_gpu):
        loss = recover(network, layers, rows, noisy, mask, goal)
    loss.total.backward()
    right = (loss.logits.detach().argmax(-1) == goal.ids).float().mean()
    seen = {"loss": loss.each.detach().mean(), "right": right}
    if share >= recipe.own_from and draws.host.random() < recipe.own_share:
        drawn, soft = draws.host.random() < 0.5, draws.host.random() < 0.5
        with _autocast(on_gpu):
            filled, embedded = own_guesses(
                network, rows, noisy, goal, loss.logits, draws.device, drawn=drawn, soft=soft, clean=recipe.own_clean
            )
            own = recover(network, layers, rows, filled, mask, goal, embedded)
        own.total.backward()
        seen["own"] = own.each.detach().mean()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    for optimizer in (model.muon, model.adamw):
        optimizer.step()
        optimizer.zero_grad()
    return seen


def _loop(recipe: Recipe, call: Call, model: Model, workers: Workers, deadline: float, seed: int) -> None:
    """Steps until the recipe's time is used or the deadline is near."""
    network, progress = model.network, model.progress
    on_gpu = call.device.type == "cuda"
    layers: Layers = [torch.compile(layer, dynamic=False) if on_gpu else layer for layer in network.layers]
    draws = Draws(Random(seed), torch.Generator(call.device).manual_seed(seed))
    total_s, every_s = recipe.minutes * 60, call.eval_every_minutes * 60
    next_eval = (progress.used_s // every_s + 1) * every_s
    seen: dict[str, list[Tensor]] = {}
    last, logged, logged_tokens = None, time.monotonic(), progress.tokens
    while progress.used_s < total_s and time.monotonic() < deadline:
        rows = _rows(workers.next(), call.device)
        for name, value in step(recipe, model, layers, rows, progress.used_s / total_s, draws).items():
            seen.setdefault(name, []).append(value)
        progress.step += 1
        progress.tokens += rows.ids.numel()
        now = time.monotonic()
        if last is not None:  # the first step of a call compiles
            progress.used_s += now - last
        last = now
        if now - logged > LOG_EVERY_S or progress.step == 1:
            means = {name: torch.stack(values).mean().item() for name, values in seen.items()}
            now = time.monotonic()
            _note(recipe, progress, means, (progress.tokens - logged_tokens) / (now - logged))
            seen, logged, logged_tokens = {}, now, progress.tokens
        if next_eval <= progress.used_s < total_s:
            next_eval += every_s
            export(network, model.tokenizer, list(recipe.blocks), call.out)
            score(recipe, call, (0.9,), max(16, call.eval_n // 4))
            last = logged = time.monotonic()


def _note(recipe: Recipe, progress: Progress, means: dict[str, float], tokens_per_s: float) -> None:
    """Log and remember the means since the last note. Raises EngineError if the loss is not finite."""
    progress.history.append({"step": progress.step, "used_s": progress.used_s, **means})
    log.info(
        "step %d  %.2f/%g min  %s  %.1f k tokens/s",
        *(progress.step, progress.used_s / 60, recipe.minutes),
        "  ".join(f"{name} {value:.4f}" for name, value in means.items()),
        tokens_per_s / 1e3,
    )
    if not math.isfinite(means["loss"]):
        raise EngineError(f"the loss is {means['loss']} at step {progress.step}; lower the learning rate")


def _rows(batch: Packed, device: torch.device) -> Rows:
    ids, prompt, doc, pos = (torch.from_numpy(column).to(device).long() for column in batch[1:])
    return Rows(batch.block_length, ids, prompt, doc, pos)


def _autocast(on_gpu: bool) -> AbstractContextManager[Any]:
    return torch.autocast("cuda" if on_gpu else "cpu", torch.bfloat16, enabled=on_gpu)
