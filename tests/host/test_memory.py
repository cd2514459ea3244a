"""How many pages fit, what is said where they do not, and that nothing half-made stays."""

from __future__ import annotations

import gc
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dlx import LLM, SamplingParams, memory
from dlx.config import Config
from dlx.errors import CapacityError, ModelError
from dlx.graphs.shapes import page_bytes
from dlx.models import layers
from dlx.models.card import Card
from dlx.network import numbers
from dlx.weights import read_config
from dlx.worker import Worker
from tests import families, gemma

GIB = 1 << 30
CUDA = torch.device("cuda")
PAGE = 1 << 20
Patch = pytest.MonkeyPatch


class Gpu:
    """What torch says of a GPU: its memory, what others hold of it, and what a run takes at its peak."""

    def __init__(
        self, patch: Patch, total: int, others: int = 0, held: int = 0, cached: int = 0, peak: int = 0
    ) -> None:
        self.total, self.others, self.held, self.cached, self.peak = total, others, held, cached, peak
        self.ran = 0
        for name, fn in {
            "mem_get_info": lambda _: (self.total - self.others - self.held - self.cached, self.total),
            "memory_allocated": lambda _: self.held,
            "memory_reserved": lambda _: self.held + self.cached,
            "max_memory_reserved": lambda _: self.held + (self.peak if self.ran else 0),
            "reset_peak_memory_stats": lambda _: None,
            "synchronize": lambda _: None,
            "empty_cache": self.emptied,
        }.items():
            patch.setattr(torch.cuda, name, fn)

    def emptied(self) -> None:
        self.cached = 0

    def run(self) -> None:
        self.ran += 1
        self.cached += self.peak

    def pages(self, most: int, row: int = 1, share: float = 0.9, graphs: int = 0, run: Any = None) -> int:
        return memory.pages(CUDA, PAGE, most, row, share, graphs, run or self.run)


def test_pages_get_what_is_left_of_the_share_after_weights_and_forwards(monkeypatch: Patch) -> None:
    gpu = Gpu(monkeypatch, 80 * GIB, others=2 * GIB, held=16 * GIB, cached=GIB, peak=4 * GIB)
    n = gpu.pages(most=10**6)
    left = int(0.9 * 80 * GIB) - 18 * GIB - 4 * GIB
    assert 0 <= left - n * PAGE < left // memory.LEADING + PAGE
    assert gpu.ran == 1


def test_captured_graphs_hold_activations_twice_and_something_each(monkeypatch: Patch) -> None:
    gpu = Gpu(monkeypatch, 80 * GIB, held=16 * GIB, peak=4 * GIB)
    n = gpu.pages(most=10**6, graphs=10)
    left = int(0.9 * 80 * GIB) - 16 * GIB - 8 * GIB - memory.WORKSPACES_BYTES - 10 * memory.GRAPH_BYTES
    assert 0 <= left - n * PAGE < left // memory.LEADING + PAGE


def test_few_pages_are_taken_without_a_measured_run(monkeypatch: Patch) -> None:
    gpu = Gpu(monkeypatch, 80 * GIB, held=16 * GIB, peak=70 * GIB)
    assert gpu.pages(most=28 * 1024) == 28 * 1024
    assert gpu.ran == 0


def test_the_pool_is_no_larger_than_all_rows_need(monkeypatch: Patch) -> None:
    gpu = Gpu(monkeypatch, 80 * GIB, held=16 * GIB, peak=GIB)
    assert gpu.pages(most=40_000) == 40_000
    assert gpu.ran == 1


@pytest.mark.parametrize("more", [0, 3 * PAGE, 40 * PAGE])
def test_a_little_more_memory_gives_as_many_pages(monkeypatch: Patch, more: int) -> None:
    assert memory.fitting(10_240 * PAGE + more, PAGE, 10**6) == 10_240


@pytest.mark.parametrize("n", [1, 63, 64, 65, 127])
def test_a_few_pages_are_not_rounded(n: int) -> None:
    assert memory.fitting(n * PAGE, PAGE, 10**6) == n


def test_a_run_that_cannot_be_measured_is_guessed_and_warned_of(monkeypatch: Patch, caplog: Any) -> None:
    def broken() -> None:
        raise RuntimeError("no kernel image")

    gpu = Gpu(monkeypatch, 80 * GIB, held=16 * GIB)
    with caplog.at_level(logging.WARNING):
        n = gpu.pages(most=10**6, run=broken)
    left = int(0.9 * 80 * GIB) - 16 * GIB
    left -= int(left * memory.GUESS)
    assert 0 <= left - n * PAGE < left // memory.LEADING + PAGE
    assert [
        r.message for r in caplog.records if "no kernel image" in r.message and "could not be measured" in r.message
    ]


def test_no_room_for_a_page_names_the_numbers_and_the_fields(monkeypatch: Patch) -> None:
    gpu = Gpu(monkeypatch, 16 * GIB, others=4 * GIB, held=8 * GIB, peak=3 * GIB)
    with pytest.raises(CapacityError) as caught:
        gpu.pages(most=10**6, share=0.9)
    for part in ("gpu_memory_utilization=0.9", "16.00 GiB", "12.00 GiB", "3.00 GiB", "kv_cache_dtype", "max_num_seqs"):
        assert part in str(caught.value)


def test_a_pool_below_the_longest_row_is_warned_of(monkeypatch: Patch, caplog: Any) -> None:
    gpu = Gpu(monkeypatch, 2 * GIB, peak=GIB)
    with caplog.at_level(logging.WARNING):
        n = gpu.pages(most=4096, row=2048)
    assert n < 2048
    assert [r for r in caplog.records if f"{n} K/V pages fit" in r.message and "2048" in r.message]


def test_on_a_cpu_pages_take_a_gib_at_most(monkeypatch: Patch) -> None:
    assert memory.pages(torch.device("cpu"), PAGE, 10**6, 1, 0.9, 0, lambda: None) == 1024
    assert memory.pages(torch.device("cpu"), PAGE, 100, 1, 0.9, 0, lambda: None) == 100


def build(folder: Path, **values: Any) -> Worker:
    return Worker(Config.from_args(folder, device="cpu", graphs="off", max_model_len=128, **values))


def test_a_page_in_fp8_is_half_of_one_in_bf16() -> None:
    heads = [(8, 128)] * 36
    assert page_bytes(heads, 16, 1) / page_bytes(heads, 16, 2) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(("kind", "itemsize"), [(None, 4), ("fp8", 1), ("fp8_e4m3", 1), ("fp8_e5m2", 1)])
def test_a_page_takes_what_is_said_of_it(nano: Path, kind: str | None, itemsize: int) -> None:
    worker = build(nano, kv_cache_dtype=kind, num_pages=6)
    scales = [layer.attn.scales for layer in worker.net.layers]
    took = sum(x.nbytes for x in (*worker.kv, *(x for x in scales if x is not None)))
    assert took == 6 * page_bytes(worker.card.kv, worker.shapes.S, itemsize)


@pytest.mark.parametrize(("name", "policy"), [("nano", "multi_bd"), ("dream", None), ("dream", "low_confidence"),
                                              ("fast_dllm_v2", "fast_dllm_v2"), ("gemma", None)])  # fmt: skip
def test_a_rehearsal_changes_no_answer(nano: Path, tmp_path: Path, name: str, policy: str | None) -> None:
    folder = nano
    if name == "gemma":
        folder = gemma.write(tmp_path, gemma.tensors(gemma.model()))
    elif name != "nano":
        folder = families.write(tmp_path, name, families.network(name))
    said = []
    for rehearsed in (False, True):
        with LLM(folder, policy=policy, device="cpu", graphs="off", max_num_seqs=2, max_model_len=64) as llm:
            worker = llm.engine.worker
            if rehearsed:
                worker._rehearse()
                assert worker.kv == () and worker.buf.done.all()
                worker._take(worker.num_pages)
            params = SamplingParams(max_tokens=12, ignore_eos=True, seed=1)
            said.append([o.token_ids for o in llm.generate([[5, 9, 11], [7] * 20], params)])
    assert said[0] == said[1] and all(said[0])


def held() -> int:
    """Bytes of all tensors that Python holds; those of the meta device have none."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (Tensor, torch.nn.Parameter) and not x.is_meta]
    return sum({id(x): x.untyped_storage().nbytes() for x in tensors}.values())


def failing(fn: Callable[..., Any], after: int) -> Callable[..., Any]:
    """`fn`, out of memory from the call after `after` on."""
    calls = iter(range(10**6))

    def failed(*args: Any, **more: Any) -> Any:
        if next(calls) >= after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return fn(*args, **more)

    return failed


def weights_fail(patch: Patch) -> None:
    # of the build on the meta device the calls come first
    real = torch.empty
    short = failing(real, 5)
    patch.setattr(layers.torch, "empty", lambda *a, **k: (real if str(k.get("device")) == "meta" else short)(*a, **k))


def pages_fail(patch: Patch) -> None:
    real, short = torch.zeros, failing(torch.zeros, 1)
    patch.setattr(memory.torch, "zeros", lambda *a, **k: (short if isinstance(a[0], tuple) else real)(*a, **k))


@pytest.mark.parametrize(
    ("fail", "parts"),
    [
        (weights_fail, ["the weights of", "do not fit", "needed", "free on cpu", "quantization='fp8'"]),
        (pages_fail, ["num_pages=64 pages", "do not fit", "needed", "free on cpu", "kv_cache_dtype='fp8'"]),
    ],
)
def test_out_of_memory_at_load_is_told_with_advice_and_nothing_stays(
    nano: Path, monkeypatch: Patch, fail: Callable[[Patch], None], parts: list[str]
) -> None:
    build(nano)  # what the first of a process keeps
    before = held()
    fail(monkeypatch)
    with pytest.raises(CapacityError) as caught:
        build(nano)
    monkeypatch.undo()
    assert [part for part in parts if part not in str(caught.value)] == []
    assert held() < before + 50_000  # though the error's traceback holds the frames; the weights are 1.3 MB


def test_what_the_device_cannot_hold_is_not_tried(nano: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(memory, "pool", lambda *_: pytest.fail("pages are made"))
    with pytest.raises(CapacityError, match="num_pages=2000000000 pages of K/V do not fit"):
        build(nano, num_pages=2_000_000_000)


def test_weights_that_the_device_cannot_hold_are_not_tried(nano: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(memory, "room", lambda _: memory.Room(1_000_000, 1_000_000))
    made = layers.torch.empty

    def empty(*args: Any, **more: Any) -> Tensor:
        assert str(more["device"]) == "meta"
        return made(*args, **more)

    monkeypatch.setattr(layers.torch, "empty", empty)
    with pytest.raises(CapacityError, match=r"the weights of .* do not fit into memory"):
        build(nano)


def test_another_error_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="illegal access"), memory.enough("it", None, torch.device("cpu"), "wait"):
        raise RuntimeError("illegal access")


@pytest.fixture
def copy(nano: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(nano, tmp_path / "model"))


HUGE = 2_000_000_000


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"num_hidden_layers": 10**12}, ["num_hidden_layers=1000000000000", "from 1 to"]),
        ({"num_hidden_layers": HUGE}, ["config.json", "at least", "its weights hold", "same checkpoint"]),
        ({"hidden_size": HUGE, "head_dim": 32}, ["config.json", "at least", "its weights hold"]),
        ({"intermediate_size": HUGE}, ["config.json", "at least", "its weights hold"]),
        ({"vocab_size": HUGE}, ["config.json", "at least", "its weights hold"]),
        ({"num_attention_heads": HUGE, "num_key_value_heads": HUGE}, ["config.json", "at least", "its weights hold"]),
    ],
    ids=str,
)
def test_absurd_sizes_are_refused_before_anything_is_built(
    copy: Path, values: dict[str, int], parts: list[str], monkeypatch: Patch
) -> None:
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    monkeypatch.setattr(layers.torch, "empty", lambda *_, **__: pytest.fail("a parameter is made"))
    with pytest.raises(ModelError) as caught:
        build(copy)
    assert [part for part in parts if part not in str(caught.value)] == []


def test_random_weights_of_an_absurd_shape_are_refused_too(copy: Path, monkeypatch: Patch) -> None:
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": HUGE}))
    monkeypatch.setattr(layers.torch, "empty", lambda *_, **__: pytest.fail("a parameter is made"))
    with pytest.raises(CapacityError, match=r"random weights of .* take .* or more, and cpu has"):
        build(copy, load_format="dummy")


def test_the_least_numbers_of_a_network_are_no_more_than_it_has(nano: Path, tiny: Path) -> None:
    for folder in (nano, tiny):
        card = Card.from_hf(*read_config(folder))
        with LLM(folder, device="cpu", graphs="off", load_format="dummy") as llm:
            there = sum(p.numel() for p in llm.engine.worker.net.parameters())
        assert 0.5 * there < numbers(card) <= there
