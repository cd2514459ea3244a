"""On a GPU: pages fit beside everything else, in bf16 and in fp8."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dlx import LLM, SamplingParams
from dlx.config import Config
from dlx.errors import CapacityError, ModelError
from dlx.graphs.shapes import page_bytes
from dlx.worker import Worker
from tests.adapters import write_adapter
from tests.checkpoints import ZOO, write

pytestmark = pytest.mark.gpu
ROOM = 3 << 29


@pytest.mark.parametrize("kind", [None, "fp8", "fp8_e5m2"])
@pytest.mark.parametrize("forwards", [1, 8])
def test_captured_answers_with_every_dtype_of_pages(tiny: Path, kind: str | None, forwards: int) -> None:
    chat: list[Mapping[str, str]] = [{"role": "user", "content": "What is 27 + 35?"}]
    with LLM(tiny, device="cuda", kv_cache_dtype=kind, forwards=forwards) as llm:
        (output,) = llm.generate([chat], SamplingParams(max_tokens=48))
    assert "62" in output.text


@pytest.mark.parametrize("kind", [None, "fp8"])
def test_a_measured_pool_leaves_room_for_every_graph_below_the_share(tiny: Path, kind: str | None) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    share = (total - free + ROOM) / total
    rows = 128 if kind is None else 256  # whose pages would take more than half of it
    config = Config.from_args(
        tiny, device="cuda", max_num_seqs=rows, max_model_len=2048, gpu_memory_utilization=share, kv_cache_dtype=kind,
        max_num_batched_tokens=256,
    )  # fmt: skip
    worker = Worker(config)
    each = page_bytes(worker.card.kv, worker.shapes.S, config.kv_dtype.itemsize)
    assert ROOM / 4 < worker.num_pages * each < ROOM
    worker.prepare(worker.shapes.rows, worker.shapes.tokens)
    assert not worker.graphs.dropped
    left, _ = torch.cuda.mem_get_info()
    assert total - left <= share * total


@pytest.mark.parametrize("fault", ["NaN", "an adapter of another model"])
def test_a_checkpoint_that_is_refused_leaves_nothing_on_the_gpu(tmp_path: Path, fault: str) -> None:
    folder, more = write(tmp_path / "checkpoint", ZOO["b4"], seed=0), dict[str, Path]()
    if fault == "NaN":  # in the last layer, so that others are on the GPU when it is found
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.2.mlp.down_proj.weight"][-1, -1] = torch.nan
        save_file(tensors, folder / "model.safetensors")
    else:
        more["lora"] = write_adapter(tmp_path / "adapter", {"model.layers.9.self_attn.q_proj": (64, 64)})
    gc.collect()
    before = torch.cuda.memory_allocated()
    with pytest.raises(ModelError) as caught:
        LLM(folder, device="cuda", check_weights=True, **more)
    assert torch.cuda.memory_allocated() < before + 32_000  # of 300,000, though the traceback holds the frames
    assert ("NaN" if fault == "NaN" else "no such matrix") in str(caught.value)


def test_weights_that_do_not_fit_are_told_and_leave_nothing(tiny: Path) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    free, _ = torch.cuda.mem_get_info()
    hog = torch.empty(free - 24 * (1 << 20), dtype=torch.uint8, device="cuda")
    with pytest.raises(CapacityError, match="do not fit into memory"):
        Worker(Config.from_args(tiny, device="cuda"))
    del hog
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
