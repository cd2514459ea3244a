"""The calls of our ops in one forward, and torch's matmuls: noted from running it eagerly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dlx.bench.scene import Stand, taken
from dlx.graphs.capture import Graphs
from dlx.graphs.either import commits
from dlx.ops import OPS
from dlx.ops.op import Cost

MATMULS = ("mm", "addmm")  # of torch: what the wide path leaves to cuBLAS


class Call(NamedTuple):
    """One call of an op in a step."""

    op: str
    of: str  # the parameter that it reads, without its layer
    cost: Cost
    again: Callable[[], object]  # the same call once more
    distinct: int | None = None  # of `experts`: how many it read


class Calls(TorchDispatchMode):
    """Notes the calls of our ops, and torch's matmuls, while it is on."""

    def __init__(self, named: Mapping[int, str]) -> None:
        super().__init__()
        self.named = named
        self.found: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        space, _, name = func.name().partition("::")
        name = name.split(".")[0]
        kwargs = kwargs or {}
        of = next((self.named[x.data_ptr()] for x in args if isinstance(x, Tensor) and x.data_ptr() in self.named), "")
        out = func(*args, **kwargs)
        if space == "dlx" or (space == "aten" and name in MATMULS):
            cost = OPS[name].cost(*args, **kwargs) if space == "dlx" else matmul_cost(*args[-2:])
            read = int(out[1]) if name == "experts" else None
            self.found.append(Call(name, of, cost, lambda: func(*args, **kwargs), read))
        return out


def matmul_cost(a: Tensor, b: Tensor) -> Cost:
    """[M, K] · [K, N]: every element read or written once."""
    M, K = a.shape
    N = b.shape[1]
    return Cost(2 * M * N * K, (M * K + K * N + M * N) * a.element_size())


def names(net: torch.nn.Module) -> dict[int, str]:
    """Address → name of each parameter, without its layer: layers.3.attn.qkv.weight → attn.qkv."""
    out = {}
    for name, p in net.named_parameters():
        parts = name.removesuffix(".weight").split(".")
        out[p.data_ptr()] = ".".join(parts[2:] if parts[0] == "layers" else parts)
    return out


@torch.no_grad()
def calls(at: Stand, committing: bool | None = None) -> list[Call]:
    """The calls of one forward, in order, from running it eagerly on the rows as they stand.

    committing  which of an Either's forwards; None: as the rows ask
    """
    worker = at.worker
    ready, plan = worker.graphs, at.scheduler.plan()
    assert plan is not None, "rows run"
    worker.graphs = Graphs("off", worker.device)
    worker.graphs.commits = commits(worker.buf.whole, worker.buf.done) if committing is None else committing
    try:
        with Calls(names(worker.net)) as noted:
            worker.launch(plan)
    finally:
        worker.graphs = ready
    while worker.in_flight:
        taken(worker, at.scheduler)
    return noted.found


def touched(at: Stand, launches: int) -> dict[str, Any] | None:
    """How many experts a forward reads in each layer that has any, mean of these launches; None for a dense network."""
    mixture = at.worker.card.mixture
    if mixture is None:
        return None
    read = [call.distinct for _ in range(launches) for call in calls(at) if call.distinct is not None]
    M = at.worker.card.layers - mixture.dense
    layers = [sum(read[i::M]) / len(read[i::M]) for i in range(M)]
    return {"mean": sum(layers) / M, "of": mixture.experts + mixture.joined, "layers": layers}
