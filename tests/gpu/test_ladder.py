"""Eager, compiled and captured runs of the bundled model give the same answers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from dlx import LLM, SamplingParams
from dlx.tasks import sample
from tests.checkpoints import ZOO, write

pytestmark = pytest.mark.gpu


def chats(n: int) -> list[list[dict[str, str]]]:
    rng = random.Random(11)
    mix = {"gsm": 1, "arith": 1, "sort": 1, "json": 1, "code": 1}
    return [[{"role": "user", "content": sample(rng, mix, want_held=True)[1]}] for _ in range(n)]


@contextmanager
def no_sync() -> Iterator[None]:
    """Any operation that makes the host wait for the device raises."""
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("policy", ["single_bd", "multi_bd"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_ladder_gives_the_same_text(tiny: Path, policy: str, dtype: str) -> None:
    params = [SamplingParams(max_tokens=192, temperature=t, seed=5) for t in [0.0] * 12 + [0.7] * 4]
    answers = {}
    for graphs in ("off", "compile", "capture"):
        with LLM(tiny, policy=policy, graphs=graphs, device="cuda", dtype=dtype, max_num_seqs=4) as llm:
            answers[graphs] = [(o.token_ids, o.nfe) for o in llm.generate(chats(16), params)]
    same = {g: sum(a == b for a, b in zip(answers["off"], answers[g])) for g in answers}
    assert same == {"off": 16, "compile": 16, "capture": 16}


def test_a_gpu_answers_as_the_cpu_does(tiny: Path) -> None:
    answers = []
    for device in ("cpu", "cuda"):
        with LLM(tiny, policy="multi_bd", graphs="off", device=device, dtype="float32") as llm:
            answers.append([(o.token_ids, o.nfe) for o in llm.generate(chats(16))])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("graphs", ["off", "capture"])
def test_a_lone_row_draws_as_on_the_cpu(tiny: Path, graphs: str) -> None:
    params = SamplingParams(max_tokens=96, temperature=0.7, seed=9)
    answers = []
    for device, how in (("cpu", "off"), ("cuda", graphs)):
        with LLM(tiny, graphs=how, device=device, dtype="float32", max_num_seqs=1) as llm:
            answers.append([(o.token_ids, o.nfe) for o in llm.generate(chats(6), params)])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("graphs", ["off", "capture"])
def test_decoding_never_makes_the_host_wait(tiny: Path, graphs: str) -> None:
    with LLM(tiny, graphs=graphs, device="cuda", max_num_seqs=4) as llm:
        expected = [o.token_ids for o in llm.generate(chats(6))]
        with no_sync():
            assert [o.token_ids for o in llm.generate(chats(6))] == expected


def test_64_steady_steps_wait_only_for_the_small_read(tiny: Path) -> None:
    from torch.profiler import ProfilerActivity, profile

    with LLM(tiny, graphs="capture", device="cuda", max_num_seqs=1) as llm:
        engine = llm.engine
        llm.generate(chats(1))
        engine.add_all([([5] * 40, SamplingParams(max_tokens=1500, threshold=1.0, ignore_eos=True))])
        for _ in range(8):
            engine.step()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            for _ in range(64):
                engine.step()
        calls = {e.key: e.count for e in seen.key_averages() if e.key.startswith("cuda")}
        assert calls.get("cudaGraphLaunch") == 64, calls  # so the profile does see what the host calls
        calls.pop("cudaDeviceSynchronize", None)  # the profiler itself waits for the device once, when it stops
        waits = {name for name in calls if "Synchronize" in name}
        assert waits <= {"cudaEventSynchronize"}  # the read of the outbox
        assert calls.get("cudaEventSynchronize", 64) == 64


@pytest.mark.parametrize("unroll", [False, True], ids=["while", "unrolled"])
def test_a_loop_on_the_device_gives_the_same_text(tiny: Path, unroll: bool) -> None:
    params = [SamplingParams(max_tokens=128, temperature=t, seed=5) for t in [0.0] * 6 + [0.7] * 2]
    answers = {}
    for forwards in (1, 3, 64):
        with LLM(tiny, forwards=forwards, unroll=unroll, device="cuda", max_num_seqs=2) as llm:
            answers[forwards] = [(o.token_ids, o.nfe) for o in llm.generate(chats(8), params)]
            route = llm.engine.worker.graphs.routes
        assert forwards == 1 or set(route.values()) == {"unrolled" if unroll else "while"}
    assert answers[3] == answers[1] and answers[64] == answers[1]


def test_one_launch_decodes_sixty_four_blocks(tmp_path: Path) -> None:
    folder, said = write(tmp_path / "blocks of 4", ZOO["b4"], seed=0), []
    for forwards in (1, 1024):
        how = {"device": "cuda", "dtype": "float32", "max_num_seqs": 1, "max_model_len": 320}
        with LLM(folder, forwards=forwards, **how) as llm:
            (output,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=256, ignore_eos=True))
            launches = llm.engine.worker.epoch
        said.append((output.token_ids, output.nfe))
    assert said[0] == said[1] and len(said[0][0]) == 256
    assert launches <= 2  # the second may be on its way when the host hears of the end


def test_a_row_that_is_dropped_in_mid_loop_leaves_the_other_as_it_is(tiny: Path) -> None:
    params = SamplingParams(max_tokens=400, threshold=1.0, ignore_eos=True)
    with LLM(tiny, forwards=64, device="cuda", max_num_seqs=2) as llm:
        ids = [llm.tokenizer.chat(messages) for messages in chats(2)]
        (alone,) = llm.generate(ids[:1], params)
        engine, outputs = llm.engine, []
        _, second = engine.add_all([(ids[0], params), (ids[1], params)])
        for turn in range(1000):
            outputs += [chunk.output for chunk in engine.step() if chunk.output]
            if turn == 1:
                engine.abort(second)
            if engine.idle:
                break
    assert [(o.token_ids, o.nfe) for o in outputs] == [(alone.token_ids, alone.nfe)]


@pytest.mark.parametrize("policy", ["single_bd", "multi_bd"])
def test_two_hundred_answers_are_the_same_alone_and_in_a_batch(tiny: Path, policy: str) -> None:
    params = SamplingParams(max_tokens=48)
    how = {"device": "cuda", "graphs": "capture", "max_num_seqs": 16, "max_model_len": 512, "batch_invariant": True}
    with LLM(tiny, policy=policy, **how) as llm:
        together = [(o.token_ids, o.nfe) for o in llm.generate(chats(200), params)]
        alone = [(o.token_ids, o.nfe) for chat in chats(200) for o in llm.generate([chat], params)]
    assert sum(a == b for a, b in zip(alone, together, strict=True)) == 200
