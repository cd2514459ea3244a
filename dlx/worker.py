"""One rank: weights, K/V pages, Block Buffer and graphs. `launch` a plan, `harvest` what it committed."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

from dlx import flight, memory, network, watch, weights
from dlx.config import Config, bind, buckets, geometry
from dlx.errors import ModelError
from dlx.graphs import buffer, canvas, loop, own, prefill, sequence, shapes
from dlx.graphs.capture import Graphs
from dlx.graphs.either import LONG, Either, both
from dlx.graphs.step import Ids, step_
from dlx.models.card import Card
from dlx.models.gemma.network import DiffusionGemma
from dlx.models.scales import scale_
from dlx.observe import marked, span
from dlx.plan import Plan, Reply
from dlx.request import STOP_IDS
from dlx.rows import Rows

log = logging.getLogger(__name__)


class Worker:
    """Owns every tensor. Its methods are called from one thread; none but `harvest` waits for the device.

    vocab  ids the tokenizer knows; those above pad the head and are never chosen
    """

    def __init__(self, config: Config, vocab: int | None = None) -> None:
        self.config = config
        self.device = torch.device(config.device)
        self._there = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        raw, generation = weights.read_config(config.model)
        card = Card.from_hf(raw, generation)
        self.card = replace(card, fp8=True) if config.quantization == "fp8" else card
        self.ids = Ids(self.card.mask_id, min(vocab or self.card.vocab, self.card.vocab), self.card.shift)
        if self.ids.mask >= self.ids.vocab:
            raise ModelError(
                f"mask_token_id={self.ids.mask} is not among the {self.ids.vocab} ids of the tokenizer; "
                "take config.json and tokenizer.json from the same checkpoint"
            )
        bound = bind(config.policy, self.card, config.block_length)
        self.policy = replace(bound, watch=config.watch, filters=bound.filters or config.filters)
        assert self.policy.L is not None
        self.L = self.policy.L
        own.tried(self.policy, self.ids, self.device, config.torch_dtype, config.graphs != "off")
        self.max_len = geometry(config, self.card, self.L).max_len
        self.step = self.policy.step  # prompts are prefilled in blocks of it: 1 is causal
        self.shapes = buckets(config, self.card, self.policy)
        windows = self.policy.turn is None and self.policy.canvas is None
        # steps are two forwards; not if other rows must not decide how one is computed
        self.either = windows and self.L >= LONG and not config.batch_invariant
        self._flights: deque[flight.Flight] = deque()
        self.kv: tuple[Tensor, ...] = ()
        self.net = network.load(config, self.card, raw, self.device)
        try:
            self._allocate()
            if config.pack is not None and config.graphs != "off":
                from dlx import pack

                pack.load(config.pack, self)
        except BaseException:
            self.release()
            raise

    def _allocate(self) -> None:
        """Everything beside the weights: the rows' tensors, K/V pages, no graphs yet."""
        config, turn = self.config, self.policy.turn
        advice = "use fewer num_pages, kv_cache_dtype='fp8', fewer max_num_seqs or a smaller max_model_len"
        each = shapes.page_bytes(self.card.kv, self.shapes.S, config.kv_dtype.itemsize)
        with memory.enough("the rows of a step do not fit into memory", None, self.device, advice):
            self._allocate_rows()
            most, graphs = config.max_num_seqs * self.shapes.W, 0
            if config.graphs == "capture":
                scopes = 1 + self.either if turn is None else len(turn.scopes)
                graphs = scopes * len(self.shapes.rows) + len(self.shapes.tokens)
            self.num_pages = config.num_pages or memory.pages(
                self.device, each, most, self.shapes.W, config.gpu_memory_utilization, graphs, self._rehearse
            )
        what = f"num_pages={self.num_pages} pages of K/V do not fit into memory"
        with memory.enough(what, self.num_pages * each, self.device, advice):
            self._take(self.num_pages)
        log.info("%d K/V pages of %d tokens, %s", self.num_pages, self.shapes.S, memory.gib(self.num_pages * each))
        self.graphs = Graphs(config.graphs, self.device)

    def _take(self, pages: int) -> None:
        """Have so many K/V pages, and no others."""
        self.kv = ()
        scale_(self.net, pages, self.config.kv_dtype)  # first: it needs memory for a while
        self.kv = memory.pool(self.card.kv, pages, self.shapes.S, self.config.kv_dtype, self.device)

    @torch.no_grad()
    def _rehearse(self) -> None:
        """Run the largest forwards once, eagerly, of nothing: every row is inert, and the pages are a few."""
        with self._there:
            self._take(memory.FEW)
            T, B = self.shapes.tokens[-1], self.config.max_num_seqs
            if self.policy.turn is None or not self.policy.turn.full:
                prefill.prefill_(self.step, self.net, self.prompts[T], self.kv)
            for scope, C in self._scopes((T,)):
                both(lambda step: step(), self._step(loop.rows(self.sent, B), scope, C)[0])
            self.kv = ()

    def _allocate_rows(self) -> None:
        config, turn, is_canvas = self.config, self.policy.turn, self.policy.canvas is not None
        B, W = config.max_num_seqs, self.shapes.W
        E = self.card.hidden if self.card.shift else 0
        self.width = self.L if turn is None or turn.blocks else self.shapes.tokens[-1]  # of what is decided at a time
        E = 0 if turn is not None else E
        self.buf = buffer.allocate(
            B, self.policy.N, self.width, W, STOP_IDS, self.device, E, config.torch_dtype,
            self.policy.memory(self.width), 1 if turn is not None or is_canvas else self.max_len + 1,
        )  # fmt: skip
        self.sequences = sequence.allocate(B, self.shapes.tokens[-1] + self.L if turn is not None else 0, self.device)
        self.memory = canvas.allocate(B, self.L, self.card.hidden if is_canvas else 0, config.torch_dtype, self.device)
        room = None if self.width == self.L else self.width
        self._send = partial(_sent, self.device)
        self.sent = loop.allocate(B, self.policy.N * self.width, config.forwards, self.device, room)
        self.rows = Rows(self.buf, self.memory, self.sequences, self.card.mask_id, self._send)
        self.epoch = self.read = self.prefills = 0  # steps sent, steps harvested, forwards of prompts
        C = self.shapes.C
        self.prompts = {T: prefill.blank(T // C, C, W, self.device) for T in self.shapes.tokens}

    def release(self) -> None:
        """Give weights and pages back; there is no launch after it."""
        memory.release((*self.net.parameters(), *self.kv))

    @torch.no_grad()
    def launch(self, plan: Plan) -> None:
        """Send one plan to the device: prompts, new rows, one step. Returns before the device is done."""
        with span("launch"), self._there:  # events, captures and Triton take the current device
            self.rows.leave(plan)
            C, most = self.shapes.C, self.shapes.tokens[-1] // self.shapes.C
            for batch in prefill.batches(plan.prefill, C, most):
                T = shapes.bucket(self.shapes.tokens, len(batch) * C)
                key = self._prefill_graph(T)
                packed = prefill.pack(batch, T // C, C, self.shapes.W)
                prefill.fill_(self.prompts[T], self._send(packed))
                with span("prefill"):
                    self.graphs.replay(key)
                self.prefills += 1
            self.rows.enter(plan)
            rows, windows = 0, None
            if plan.bucket:
                rows, C = self._ready(plan.bucket, plan.scope, plan.reach)
                key = self._step_graph(rows, plan.scope, C)
                self.epoch += 1
                if self.looped:
                    self.sent.left.fill_(self.sent.most)
                    self.sent.epoch.fill_(self.epoch)
                with span("step"):
                    self.graphs.replay(key)
                windows = watch.packed(plan, self.buf, self.sent.step, self._send)
            # of prompts alone too: else the host would send all of a long one at once, and who comes meanwhile waits
            self._flights.append(flight.sent(plan, self._outbox(rows), windows))
            for id in plan.resume.values():
                self.rows.forget(id)

    @torch.no_grad()
    def prepare(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Make the graphs of these buckets, the largest first, and run what is made once, while no row decodes."""
        with self._there:
            for T in sorted(tokens, reverse=True) if self.policy.turn is None or not self.policy.turn.full else ():
                self.graphs.replay(self._prefill_graph(T))
            for B, (scope, C) in product(sorted(rows, reverse=True), self._scopes(tokens)):
                key = self._step_graph(B, scope, C)
                if self.config.graphs != "off":
                    self.graphs.replay(key)
                if self.config.graphs != "capture":
                    self.graphs.turn(key)  # of a loop, which has none to run while every row is inert

    @property
    def in_flight(self) -> int:
        """Launches not yet harvested."""
        return len(self._flights)

    @property
    def oldest(self) -> Plan:
        """What `harvest` reads next."""
        return self._flights[0].plan

    def harvest(self) -> tuple[Plan, list[Reply]]:
        """Wait for the oldest launch and read its outbox: one reply a row of its bucket."""
        oldest = self._flights[0]  # until it is read: an interrupt loses nothing
        with span("harvest"):
            if oldest.landed is not None:
                oldest.landed.synchronize()
            ends, F = self.policy.turn is not None, buffer.FACTS
            windows = watch.unpacked(oldest.plan, oldest.windows, self.policy.N + 1, self.width, ends)
            rows = enumerate(oldest.outbox.tolist())
            replies = [Reply(row[:-F], *row[-F:], window=windows.get(slot)) for slot, row in rows]
            self._flights.popleft()
            self.read += oldest.plan.bucket > 0
            return oldest.plan, replies

    def stop(self, slot: int) -> None:
        """Make a row inert from the next launch on; a loop on the device ends with its forward."""
        self.sent.halt.fill_(self.epoch)  # the device reads it where it lies, on the host
        self.buf.done[slot].fill_(True)

    def discard(self) -> list[Plan]:
        """Forget the launches in flight, whose rows are all inert, or lost."""
        plans = [sent.plan for sent in self._flights]
        self._flights.clear()
        return plans

    @property
    def looped(self) -> bool:
        """A launch runs several forwards."""
        return self.config.forwards > 1

    def _outbox(self, rows: int) -> Tensor:
        return (self.sent.out if self.looped else self.sent.step)[:rows]

    def _scopes(self, tokens: Sequence[int]) -> list[tuple[int, int]]:
        """Numbers and positions a row of the policy's scopes; of those that depend on the row, buckets of `tokens`."""
        if self.policy.turn is None:
            return [(0, 0)]
        widths = [what.width(self.L) for what in self.policy.turn.scopes]
        buckets = sorted(tokens or self.shapes.tokens, reverse=True)
        return [(scope, C) for scope, width in enumerate(widths) for C in ([width] if width else buckets)]

    def _ready(self, bucket: int, scope: int, reach: int) -> tuple[int, int]:
        """Rows, and positions a row. Rows are the bucket's, or those of a larger one whose graph is made already: rows
        that are not there cost less than making it."""
        fixed = 0 if self.policy.turn is None else self.policy.turn.scopes[scope].width(self.L)
        C = fixed if self.policy.turn is None or fixed else shapes.bucket(self.shapes.tokens, reach)
        made = [B for B in self.shapes.rows if bucket <= B and self._key(B, scope, C) in self.graphs]
        made = [B for B in made if self._key(B, scope, C) not in self.graphs.dropped] or made
        return bucket if self.config.graphs == "off" or not made else made[0], C

    def _key(self, B: int, scope: int, C: int) -> tuple[str | int, ...]:
        return ("step", B) if self.policy.turn is None else ("step", B, scope, C)

    def _prefill_graph(self, T: int) -> tuple[str, int]:
        key = ("prefill", T)
        if key not in self.graphs:
            self.graphs.add(key, partial(prefill.prefill_, self.step, self.net, self.prompts[T], self.kv))
        return key

    def _step_graph(self, B: int, scope: int = 0, C: int = 0) -> tuple[str | int, ...]:
        """A graph is made by running it: meanwhile every row is inert, so nothing that decodes is touched."""
        key = self._key(B, scope, C)
        if key not in self.graphs:
            done = self.buf.done.clone()
            self.buf.done.fill_(True)
            sent = loop.rows(self.sent, B)
            step, busy = self._step(sent, scope, C)
            step = both(marked, step) if self.config.graphs == "off" else step
            try:
                if self.looped:
                    begin = partial(loop.begin_, sent, buffer.rows(self.buf, B), busy)
                    turn = both(lambda step: partial(loop.turn_, step, busy, sent), step)
                    self.graphs.add_loop(key, begin, turn, sent, self.config.unroll)
                else:
                    self.graphs.add(key, step)
            finally:
                self.buf.done.copy_(done)
        return key

    def _step(self, sent: loop.Launch, scope: int, C: int) -> tuple[Callable[..., None] | Either, Callable[[], Tensor]]:
        """One forward of the first rows, those of `sent`, and who of them takes part in it."""
        out, B = sent.step, len(sent.step)
        view = buffer.rows(self.buf, B)
        if self.policy.turn is not None:
            whole = sequence.rows(self.sequences, B)
            facts = self.policy, scope, C, self.ids
            step = partial(sequence.sequence_, *facts, self.net, view, whole, self.kv, out)
            return step, partial(sequence.busy, whole, view, scope)
        if isinstance(self.net, DiffusionGemma):
            soft = canvas.rows(self.memory, B)
            step = partial(canvas.canvas_, self.policy, self.ids, self.net, view, soft, self.kv, out)
        else:
            step = partial(step_, self.policy, self.ids, self.net, view, self.kv, out)
            if self.either:
                step = Either(step, partial(step, commits=False), view.whole, view.done)
        return step, partial(loop.running, view)


def _sent(device: torch.device, packed: Tensor) -> Tensor:
    """A copy on the device that is on its way; no method of the worker, which would hold itself by it."""
    return packed if device.type == "cpu" else packed.pin_memory().to(device, non_blocking=True)
