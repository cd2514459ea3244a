"""What is measured: a shape, requests that stand at a context, a forced schedule; and how a worker runs it.

Weights are random, of the true shape, and so is the context's K/V; acceptance is forced (policy `fixed`): a figure is
of speed, and tokens per forward are a choice here, not a quality.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dlx import weights
from dlx.bench.clock import Replays, counted_syncs
from dlx.config import Config
from dlx.errors import ConfigError
from dlx.graphs.either import commits
from dlx.graphs.policies import POLICIES, Policy, named
from dlx.graphs.rules import Fixed
from dlx.models.card import Card
from dlx.models.families import FAMILIES
from dlx.pages import PagePool
from dlx.request import Request, SamplingParams
from dlx.scheduler import Scheduler
from dlx.worker import Worker

if TYPE_CHECKING:
    from dlx.engine import Engine

STACKS = ("gate_up", "down", "gate_up_scale", "down_scale")  # a layer's experts; an MLP's names end otherwise
PLAIN = {"eos_token": "0", "pad_token": "0"}  # tokenizer_config.json of the tokenizer that is written here


class How(NamedTuple):
    """How it runs; None is the device's own choice. Fields of `dlx.config.Config`."""

    graphs: str | None = None
    device: str | None = None
    dtype: str | None = None
    forwards: int = 1
    unroll: bool = False
    quantization: str | None = None
    kv_cache_dtype: str | None = None
    batch_invariant: bool = False
    max_num_batched_tokens: int = 2048


class Scene(NamedTuple):
    """A shape at a block length, requests that stand at a context, a forced schedule."""

    shape: Path  # a folder with config.json, or the file itself
    block: int
    context: int  # tokens before the answer
    requests: int
    accept: int  # tokens accepted a forward
    blocks: int = 1  # of a row that may decode at once

    def describe(self) -> dict[str, Any]:
        name = self.shape.name if self.shape.is_dir() else self.shape.stem
        return {**self._asdict(), "shape": name}

    def card(self) -> Card:
        """The card of the shape at the block length."""
        return Card.from_hf(self.raw(), {})

    def raw(self) -> dict[str, Any]:
        """The shape's config.json at the block length, by the name that its family gives to that."""
        raw = published(self.shape)
        key = FAMILIES[Card.from_hf(raw, {}).arch].keys.get("block_size", "block_size")
        return {k: v for k, v in raw.items() if k not in ("block_length", "trained_block_lengths")} | {key: self.block}

    def policy(self) -> Policy:
        """The forced schedule; a canvas, which has no masks to accept, is decoded by its model's own policy."""
        own = POLICIES[self.card().policy]
        return own if own.canvas else replace(named("fixed"), N=self.blocks, select=Fixed(self.accept))

    def files(self, folder: Path, words: bool = False) -> None:
        """Write the shape's config.json, at the block length; with `words` a tokenizer that knows no language too."""
        card = self.card()  # a family that is not built is refused before anything else is made
        Path(folder, "config.json").write_text(json.dumps(self.raw()))
        if words:
            model = {"type": "WordLevel", "vocab": {str(i): i for i in range(card.vocab)}, "unk_token": "0"}
            whole = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model}
            Path(folder, "tokenizer.json").write_text(json.dumps(whole))
            Path(folder, "tokenizer_config.json").write_text(json.dumps(PLAIN))

    def config(
        self, folder: Path, how: How, max_len: int, policy: Policy, rows: int, pages: int | None = None
    ) -> Config:
        """What a worker or an engine of `files(folder)` is built with, so that `rows` decode at once."""
        return Config.from_args(
            folder, policy, how.graphs, how.device, how.dtype, load_format="dummy", max_num_seqs=rows,
            max_model_len=max_len, forwards=how.forwards, unroll=how.unroll, quantization=how.quantization,
            kv_cache_dtype=how.kv_cache_dtype, num_pages=pages, batch_invariant=how.batch_invariant,
            max_num_batched_tokens=how.max_num_batched_tokens,
            prefix_caching=False,  # the same prompts are served again: to find their pages would measure another thing
        )  # fmt: skip

    def worker(self, how: How, max_len: int, policy: Policy | None = None, pages: int | None = None) -> Worker:
        """A worker with random weights of the shape; else with the forced schedule, and as many pages as fit."""
        with tempfile.TemporaryDirectory() as folder:
            self.files(Path(folder))
            return Worker(self.config(Path(folder), how, max_len, policy or self.policy(), self.requests, pages))

    def engine(self, how: How, max_len: int, rows: int) -> Engine:
        """An engine with random weights of the shape, and a tokenizer that knows no language."""
        from dlx.engine import Engine  # brings tokenizers, which a worker does without

        with tempfile.TemporaryDirectory() as folder:
            self.files(Path(folder), words=True)
            return Engine(self.config(Path(folder), how, max_len, self.policy(), rows))


def published(shape: Path) -> dict[str, Any]:
    """The config.json of a shape, a file or a folder. Raises ConfigError if it is not there."""
    source = shape / "config.json" if shape.is_dir() else shape
    if not source.is_file():
        raise ConfigError(f"{source} is not there; name a shape of dlx/bench/shapes, or a checkpoint's folder")
    return weights.read_json(source)


class Stand(NamedTuple):
    """Requests that decode behind their contexts; `key` is the graph of their launches."""

    worker: Worker
    scheduler: Scheduler
    key: Hashable
    context: int

    def rewind(self) -> None:
        """Put every row back behind its context, so that what is timed next is timed there."""
        self.worker.buf.start.fill_(self.context // self.worker.step * self.worker.step)

    def launch(self) -> None:
        """Send a launch as the worker does, without reading it."""
        self.worker.sent.left.fill_(self.worker.sent.most)
        self.worker.graphs.replay(self.key)

    def turn(self) -> None:
        """One forward alone, as the launch holds it."""
        self.worker.graphs.turn(self.key)

    def plain(self) -> None:
        """Run forwards until no block only commits; at most L of them, where rows commit in turns."""
        buf = self.worker.buf
        for _ in range(self.worker.L):
            if not commits(buf.whole, buf.done):
                break
            self.turn()

    def committing(self) -> None:
        """Have every row's first block commit in the next forward, back behind its context."""
        self.rewind()
        self.worker.buf.whole[:, 0].fill_(True)
        self.worker.buf.open.fill_(2)

    def leave(self) -> None:
        """Drop the requests: their slots are free."""
        for id, slot in [(r.id, r.slot) for r in self.scheduler.running.values()]:
            self.scheduler.abort(id)
            if slot is not None:
                self.worker.stop(slot)

    def reached(self) -> int:
        """Tokens before the window, all rows together; waits for the device."""
        return int(self.worker.buf.start.sum())

    def decided(self) -> int:
        """Tokens that are no mask, all rows together: also those of blocks that are not yet committed.

        A canvas has none before it is committed.
        """
        if self.worker.policy.canvas:
            return self.reached()
        return self.reached() + int((self.worker.buf.tok != self.worker.ids.mask).sum())


class Decoded(NamedTuple):
    """What a stretch of launches gave."""

    tokens_per_forward: float
    nfe: int  # forwards of the rows, summed
    forwards: int  # that the device ran
    wall_s: float
    launches_s: float  # of them on the device
    syncs: int | None  # operations that made the host wait for the device; None without a GPU


def prompts(card: Card, n: int, length: int) -> list[list[int]]:
    """n prompts of random ids."""
    rng = random.Random(0)
    ids = [i for i in range(min(card.vocab, 1000)) if i != card.mask_id]
    return [rng.choices(ids, k=length) for _ in range(n)]


def schedule(worker: Worker) -> Scheduler:
    """A scheduler of all the worker's rows and pages."""
    return Scheduler(worker.policy, worker.card, worker.shapes, PagePool(worker.num_pages), worker.max_len)


@torch.no_grad()
def stand(worker: Worker, scene: Scene) -> Stand:
    """Admit the requests, so that every row decodes behind `context` tokens; their K/V is random, not prefilled."""
    scheduler = schedule(worker)
    params = SamplingParams(max_tokens=worker.max_len - scene.context, ignore_eos=True, seed=0)
    for n, prompt in enumerate(prompts(worker.card, scene.requests, scene.context)):
        scheduler.add(Request(n, prompt, params, time.monotonic()))
    plan = scheduler.plan()
    if plan is None or len(plan.running) < scene.requests:
        raise ConfigError(
            f"{scene.requests} requests of {worker.max_len} tokens do not fit into the K/V cache of "
            f"{worker.num_pages} pages; use fewer requests, a smaller context or fewer steps"
        )
    for plane in (plane for pages in worker.kv for plane in pages):  # fp8 has no draws of its own
        plane.copy_(torch.randn_like(plane, dtype=worker.config.torch_dtype))
    with Replays(worker) as replays:
        worker.launch(plan._replace(prefill=[]))
    taken(worker, scheduler)
    return Stand(worker, scheduler, replays.keys[-1], scene.context)


@torch.no_grad()
def decode(at: Stand, launches: int) -> Decoded:
    """A stretch of launches as the engine sends them: one overlaps, none waits.

    Two go before those that are timed. Tokens are counted where they are decided, over all of them: blocks are
    committed whole, so that a short stretch would show too few or too many.
    """
    worker, scheduler = at.worker, at.scheduler
    at.rewind()
    decided, ages = at.decided(), int(worker.buf.age.sum())
    turn(worker, scheduler)
    turn(worker, scheduler)  # the host's counts are the device's again
    rows = list(scheduler.running.values())
    before = [r.nfe for r in rows]
    with Replays(worker) as replays, counted_syncs(worker.device) as syncs:
        began = time.monotonic()
        for _ in range(launches):
            turn(worker, scheduler)
        wall_s = time.monotonic() - began
    spent = [r.nfe - b for r, b in zip(rows, before, strict=True)]
    while worker.in_flight:
        taken(worker, scheduler)
    each = (at.decided() - decided) / (int(worker.buf.age.sum()) - ages)
    return Decoded(each, sum(spent), max(spent), wall_s, sum(replays.ms("step")) / 1e3, syncs.n)


def turn(worker: Worker, scheduler: Scheduler) -> None:
    """Send one launch, read the one before."""
    plan = scheduler.plan()
    assert plan is not None, "the requests must outlast the measurement"
    worker.launch(plan)
    if worker.in_flight > 1:
        taken(worker, scheduler)


def taken(worker: Worker, scheduler: Scheduler) -> None:
    """Read the oldest launch."""
    plan, replies = worker.harvest()
    scheduler.take(plan.running, replies)


def floor_bytes(worker: Worker, tokens: int, rows: int = 1, experts: float | None = None) -> dict[str, int]:
    """Bytes that a forward must read: every weight but an input table once, and the K/V of so many tokens.

    rows     that the tokens are of, for layers that see a window of each
    experts  that are read of each layer's, on average; None is all
    """
    net, card = worker.net, worker.card
    read = sum(int(p.nbytes) for p in net.parameters()) - (0 if card.tied else int(net.table.nbytes))
    if experts is not None:
        stacks = [p for name, p in net.named_parameters() if name.rpartition(".")[2] in STACKS]
        read -= sum(int(p.nbytes * (1 - experts / len(p))) for p in stacks)
    shown = card.gemma.window - 1 if card.gemma else 0
    kv = sum(
        G * D * (min(tokens, rows * shown) if card.gemma and not card.gemma.everywhere[i] else tokens)
        for i, (G, D) in enumerate(card.kv)
    )
    return {"weights": read, "kv": 2 * kv * worker.config.kv_dtype.itemsize}
