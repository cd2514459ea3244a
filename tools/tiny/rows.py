"""Packed training rows, made by worker processes that end with the trainer."""

from __future__ import annotations

import multiprocessing
import os
import queue
from collections.abc import Iterator, Mapping
from multiprocessing.queues import Queue
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from dlx.errors import EngineError
from dlx.tasks import sample
from tools.tiny.vocabulary import PAD, Document, encode

FAR = 1 << 14  # prompt length of padding: past every row
POOL, DRAWN, TRIED = 64, 256, 40  # documents: fewest in stock, drawn at a time, tried for a gap
EXTRA_BLOCK = 0.25  # share of documents with a whole block of padding after their end
PATIENCE_S = 300.0  # before a silent worker counts as lost; the templates' import alone may take 20 s


class Packing(NamedTuple):
    """What the rows are made of; `blocks` gives each block length's share of the batches."""

    mix: Mapping[str, float]
    blocks: Mapping[int, float]
    rows: int
    row_tokens: int


class Packed(NamedTuple):
    """One batch as `noise.Rows` has it, still on the host, each [rows, row_tokens]."""

    block_length: int
    ids: np.ndarray  # int64
    prompt: np.ndarray  # int16
    doc: np.ndarray  # int16
    pos: np.ndarray  # int16


def packed(tokenizer: Tokenizer, packing: Packing, seed: int) -> Iterator[Packed]:
    """Endless batches: documents one after another, each padded to whole blocks, newest first that fits."""
    rng = Random(seed)
    pool: list[Document] = []
    while True:
        L = rng.choices(list(packing.blocks), list(packing.blocks.values()))[0]
        batch = _empty(L, packing)
        for b in range(packing.rows):
            _fill(batch, b, tokenizer, packing, rng, pool)
        yield batch


def _fill(batch: Packed, b: int, tokenizer: Tokenizer, packing: Packing, rng: Random, pool: list[Document]) -> None:
    """Fill row b with documents from the pool, which is kept stocked."""
    L, R = batch.block_length, packing.row_tokens
    at, doc = 0, 1
    while True:
        if len(pool) < POOL:
            drawn = [sample(rng, packing.mix) for _ in range(DRAWN)]
            documents = encode(tokenizer, [(one.prompt, one.answer) for one in drawn])
            pool += [document for document in documents if _blocks(document, L) * L + L <= R]
        last = max(-1, len(pool) - TRIED)
        fits = (i for i in range(len(pool) - 1, last, -1) if _blocks(pool[i], L) * L <= R - at)
        chosen = next(fits, None)
        if chosen is None:
            break
        n = _blocks(pool[chosen], L) * L
        prompt, answer = pool.pop(chosen)
        if rng.random() < EXTRA_BLOCK and at + n + L <= R:
            n += L
        batch.ids[b, at : at + len(prompt) + len(answer)] = prompt + answer
        batch.prompt[b, at : at + n] = len(prompt)
        batch.doc[b, at : at + n] = doc
        batch.pos[b, at : at + n] = np.arange(n)
        at, doc = at + n, doc + 1
    batch.pos[b, at:] = np.arange(R - at)


def _blocks(document: Document, L: int) -> int:
    return -(-(len(document[0]) + len(document[1])) // L)


def _empty(L: int, packing: Packing) -> Packed:
    size = packing.rows, packing.row_tokens
    ids, prompt = np.full(size, PAD, np.int64), np.full(size, FAR, np.int16)
    return Packed(L, ids, prompt, np.zeros(size, np.int16), np.zeros(size, np.int16))


class Workers:
    """Processes that fill a queue with batches; each has its own seed."""

    def __init__(self, tokenizer: Path, packing: Packing, seed: int, n: int) -> None:
        spawn = multiprocessing.get_context("spawn")  # not fork: the parent has threads, and may have CUDA
        self._queue: Queue[Packed] = spawn.Queue(4 * n)
        self._processes = [
            spawn.Process(target=_work, args=(self._queue, tokenizer, packing, seed + i), daemon=True) for i in range(n)
        ]
        for process in self._processes:
            process.start()

    def next(self) -> Packed:
        """The next batch. Raises EngineError if the workers ended or give none."""
        try:
            return self._queue.get(timeout=PATIENCE_S)
        except queue.Empty:
            alive = sum(process.is_alive() for process in self._processes)
            raise EngineError(
                f"no training rows in {PATIENCE_S:g} s; {alive} of {len(self._processes)} workers are alive, "
                "see their messages above"
            ) from None

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.terminate()
            process.join()


def _work(batches: Queue[Packed], tokenizer: Path, packing: Packing, seed: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    for batch in packed(Tokenizer.from_file(str(tokenizer)), packing, seed):
        batches.put(batch)
