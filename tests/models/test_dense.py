"""Dense layers as ops: what an op promises, and that a layer is compiled once."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dlx.config import Config
from dlx.graphs.prefill import Stretch, batches, fill_, pack
from dlx.models import dense
from dlx.models.decoder import Decoder
from dlx.ops.linear import squared
from dlx.worker import Worker


@pytest.fixture
def worker(nano: Path) -> Worker:
    return Worker(Config.from_args(nano, "single_bd", "off", device="cpu", max_num_seqs=1, max_model_len=1024))


def arguments(worker: Worker, op: str, C: int) -> tuple[Any, ...]:
    """C random activations at the beginning of a row's pages."""
    net, kv = worker.net, worker.kv
    assert isinstance(net, Decoder)
    h = torch.randn(C, worker.card.hidden, generator=torch.Generator().manual_seed(0))
    pos = torch.arange(C, dtype=torch.int32)[None]
    pages = torch.arange(worker.shapes.W, dtype=torch.int32)[None]
    x = h[None].clone()
    stream = (x,) if op == "wide_layers" else (h, h * net.layers[0].attn_norm.weight, squared(h))
    return (*stream, pos, pages, pos + 1, [torch.zeros_like(pages) for pages in kv], net.number)


@pytest.mark.parametrize("op", ["narrow_layers", "wide_layers"])
@torch.no_grad()
def test_an_op_keeps_its_promises(worker: Worker, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_compiled", lambda: dense.wide)
    torch.library.opcheck(getattr(torch.ops.dlx, op).default, arguments(worker, op, 16))


@torch.no_grad()
def test_a_layer_for_many_rows_computes_what_one_for_few_rows_does(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "_compiled", lambda: dense.wide)
    few, many = (arguments(worker, op, 16) for op in ("narrow_layers", "wide_layers"))
    a, squares = torch.ops.dlx.narrow_layers(*few)
    x, more = torch.ops.dlx.wide_layers(*many)
    a = a * torch.rsqrt(squares.sum(1, keepdim=True) / a.shape[1] + worker.card.eps)
    torch.testing.assert_close(worker.net.norm(x + more)[0], a, rtol=1e-4, atol=1e-4)
    for one, other in zip(few[-2], many[-2], strict=True):
        assert one.any()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_layer_is_compiled_once_for_all_that_are_like_it(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def noted(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    layer = torch.compile(dense.wide, backend=noted, fullgraph=True, dynamic=False)
    monkeypatch.setattr(dense, "_compiled", lambda: layer)
    args = arguments(worker, "wide_layers", 16)
    torch.ops.dlx.wide_layers(*args)
    assert worker.card.layers > 1
    assert len(graphs) == 1
    torch.ops.dlx.wide_layers(*arguments(worker, "wide_layers", 32))
    assert len(graphs) == 2


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_prompt_stores_what_an_eager_one_does(nano: Path) -> None:
    T, stored = 512, []
    for graphs in ("off", "compile"):
        config = Config.from_args(nano, "single_bd", graphs, device="cpu", max_num_seqs=1, max_model_len=1024)
        worker = Worker(config)
        C, W = worker.shapes.C, worker.shapes.W
        ids = torch.randint(0, 100, (2, T), generator=torch.Generator().manual_seed(0)).tolist()
        key = worker._prefill_graph(T)
        for tok, start in zip(ids, (0, T), strict=True):
            stretches = list(batches([Stretch(tok, start, list(range(W)))], C, T // C))
            fill_(worker.prompts[T], pack(stretches[0], T // C, C, W))
            worker.graphs.replay(key)
        stored.append(worker.kv)
    for eager, compiled in zip(*stored, strict=True):
        assert eager.any()
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


def test_a_network_that_is_gone_leaves_nothing_behind(nano: Path) -> None:
    config = Config.from_args(nano, "single_bd", "off", device="cpu", max_num_seqs=1, max_model_len=256)
    net = Worker(config).net
    assert isinstance(net, Decoder)
    number = int(net.number)
    assert number in dense.NETWORKS
    del net
    gc.collect()
    assert number not in dense.NETWORKS
