"""K/V memory: how many pages fit, and the pages."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dlx.errors import CapacityError
from dlx.graphs import shapes

CPU_PAGES_BYTES = 1 << 30  # what K/V pages may take on a CPU by default
GPU_PAGES_SHARE = 0.85  # of the memory left after the weights

Heads = tuple[tuple[int, int], ...]  # (G, D) of each layer


def pages_that_fit(heads: Heads, S: int, dtype: torch.dtype, device: torch.device, most: int) -> int:
    """Pages that the device has room for, `most` at most. Raises CapacityError if there is room for none."""
    each = shapes.page_bytes(heads, S, dtype.itemsize)
    room = CPU_PAGES_BYTES
    if device.type == "cuda":
        room = int(torch.cuda.mem_get_info(device)[0] * GPU_PAGES_SHARE)
    fit = min(most, room // each)
    if fit < 1:
        raise CapacityError(f"no K/V page of {each} bytes fits into {room} bytes; use a smaller model or page_size")
    return fit


def pool(
    heads: Iterable[tuple[int, int]], pages: int, S: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """Zeroed pages, [2, pages, S, G, D] a layer with a storage of its own: Inductor copies views that share one."""
    try:
        return tuple(torch.zeros((2, pages, S, G, D), dtype=dtype, device=device) for G, D in heads)
    except RuntimeError as error:
        raise CapacityError(f"num_pages={pages} pages of K/V do not fit into memory; use fewer") from error
