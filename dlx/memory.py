"""Memory: what a device has, how many K/V pages fit into it, the pages, and what is said when it runs out.

On a GPU the pages get what is left of `gpu_memory_utilization`:

    share · total − used − activations − graphs      used: by anybody: weights, buffers, CUDA itself, other processes

Pages that take less than half of what is left are taken unmeasured. Else the largest prefill and step run once with a
few pages, eagerly, which needs no less than the same compiled. Graphs keep their activations in a pool of their own
while others are warmed up, so these count twice. On a CPU pages take a GiB at most.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from triton.errors import TritonError

from dlx.errors import CapacityError
from dlx.graphs.capture import short

log = logging.getLogger(__name__)

CPU_PAGES_BYTES = 1 << 30  # what K/V pages may take on a CPU by default
UNMEASURED = 0.5  # share of what is left below which pages need no measured run
GUESS = 0.25  # of what is left, for activations that could not be measured
GRAPH_BYTES = 16 << 20  # of a captured graph, beside its activations
WORKSPACES_BYTES = 128 << 20  # of cuBLAS, a stream's, where graphs are warmed up and captured
FEW = 16  # pages of a measured run: a multiple of 16, as Triton makes other kernels of 1
LEADING = 64  # a number of pages has so many leading values: like starts have like graphs, which a pack holds


class Room(NamedTuple):
    """A device's memory in bytes."""

    total: int
    free: int  # of it, before anything else is taken


def room(device: torch.device) -> Room:
    """What a device has now; what torch holds and does not use is free. A CPU's own memory is free as a whole."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Room(total, free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Room(total, total)


def left(room: Room, share: float) -> int:
    """Bytes that may still be taken: `share` of all of it, less what is used by now."""
    return int(share * room.total) - (room.total - room.free)


def reserve(activations: int, graphs: int) -> int:
    """Bytes that the forwards of so many captured graphs take beside weights and pages; of none without capture."""
    return activations + (activations + WORKSPACES_BYTES + graphs * GRAPH_BYTES if graphs else 0)


def fitting(bytes_left: int, each: int, most: int) -> int:
    """Pages of `each` bytes that fit, `most` at most; 0 if none does."""
    n = min(most, bytes_left // each)
    if n < 1 or n == most:
        return max(n, 0)
    return n - n % max(1, (1 << n.bit_length() - 1) // LEADING)


def pages(
    device: torch.device, each: int, most: int, row: int, share: float, graphs: int, run: Callable[[], None]
) -> int:
    """How many pages the pool gets.

    each    bytes of one
    most    that all rows can need together
    row     that the longest row needs
    graphs  that will be captured
    run     the largest forwards, once, with FEW pages
    Raises CapacityError  if not one fits
    """
    if device.type != "cuda":
        n, where = fitting(CPU_PAGES_BYTES, each, most), "the GiB that they may take on a CPU"
        activations = 0
    else:
        now = room(device)
        rest = left(now, share)
        if most * each <= UNMEASURED * rest:
            return most
        activations = measured(device, run, int(max(rest, 0) * GUESS))
        rest = left(room(device), share)
        n = fitting(rest - reserve(activations, graphs), each, most)
        where = (
            f"gpu_memory_utilization={share:g} of {gib(now.total)} on {device}: {gib(now.total - now.free)} are in "
            f"use, and forwards need {gib(reserve(activations, graphs))}"
        )
    if n < 1:
        raise CapacityError(
            f"no K/V page of {each} bytes fits into {where}; use a smaller model, quantization='fp8', "
            "kv_cache_dtype='fp8', fewer max_num_seqs, or a larger gpu_memory_utilization"
        )
    if n < row:
        log.warning(
            "%d K/V pages fit, and a request of max_model_len tokens needs %d: longer ones are refused; lower "
            "max_num_seqs or max_model_len, or use kv_cache_dtype='fp8'", n, row
        )  # fmt: skip
    return n


def measured(device: torch.device, run: Callable[[], None], guess: int) -> int:
    """Bytes that a run takes at its peak beside what is there; `guess` and a warning if that cannot be told.

    Raises CapacityError  if the run itself finds no memory
    """
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_reserved(device)
        run()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_reserved(device)
        torch.cuda.empty_cache()
    except (RuntimeError, TritonError) as error:
        if short(error):
            raise
        log.warning("activations are taken to need %s, as they could not be measured: %s", gib(guess), error)
        return guess
    return max(peak - before, 0)


def pool(
    heads: Iterable[tuple[int, int]], pages: int, S: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """Zeroed pages, [2, pages, S, G, D] a layer with a storage of its own: Inductor copies views that share one."""
    return tuple(torch.zeros((2, pages, S, G, D), dtype=dtype, device=device) for G, D in heads)


def release(tensors: Iterable[Tensor]) -> None:
    """Give the memory of tensors back, whoever still holds them: an error's traceback does."""
    for tensor in tensors:
        tensor.untyped_storage().resize_(0)


@contextmanager
def enough(what: str, need: int | None, device: torch.device, advice: str) -> Iterator[None]:
    """Raise CapacityError, with numbers and advice, where `need` bytes are not there, or memory runs out within.

    What is more than the device has is not tried.
    """
    now = room(device)
    needed = "" if need is None else f"{gib(need)} needed, "
    message = f"{what}: {needed}{gib(now.free)} of {gib(now.total)} free on {device}; {advice}"
    if need is not None and need > now.free:
        raise CapacityError(message)
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not short(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold what was made so far
        raise CapacityError(message) from error


def gib(n: int) -> str:
    return f"{n / (1 << 30):.2f} GiB"
