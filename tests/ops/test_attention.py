"""Attention over pages: its reference against plain loops, its kernel under any launch configuration."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from dlx.errors import ShapeError
from dlx.ops.attention import Launch, attention, launch
from dlx.ops.attention.launches import choose, shared_bytes
from dlx.ops.op import locks, shared_limit

CASES = attention.cases()
CONFIGS = [
    Launch(BM=16, BN=16, splits=4, warps=4, stages=3, full=True),
    Launch(BM=16, BN=32, splits=2, warps=4, stages=2),
    Launch(BM=32, BN=16, splits=16, warps=4, stages=2, full=True),
    Launch(BM=16, BN=64, splits=1, warps=4, stages=1, full=True),
    Launch(BM=16, BN=128, splits=1, warps=4, stages=2),
    Launch(BM=32, BN=32, splits=4, warps=2, stages=2, full=True),
]
TARGETS = [(132, 227 << 10), (108, 163 << 10), (84, 99 << 10)]  # processors, shared memory of a program


def loops(q: Tensor, kv: Tensor, pages: Tensor, seen: Tensor, scale: float, *options: Tensor | None) -> Tensor:
    """Attention one query, one head, one key after the other."""
    first, hole, scales = options
    B, C, H, D = q.shape
    S, G = kv.shape[2], kv.shape[3]
    out = torch.zeros(B, C, H, D, dtype=torch.float64)
    for b in range(B):
        for c in range(C):
            keys = [
                j
                for j in range(int(seen[b, c]))
                if (first is None or j >= first[b, c]) and (hole is None or not hole[b, 0] <= j < hole[b, 1])
            ]
            for h in range(H):
                g = h * G // H
                weighted = []
                for j in keys:
                    page = int(pages[b, j // S])
                    k, v = (
                        kv[i, page, j % S, g].double() * (1 if scales is None else scales[i, page, g].double())
                        for i in (0, 1)
                    )
                    weighted.append((math.exp(scale * float(q[b, c, h].double() @ k)), v))
                total = sum(w for w, _ in weighted)
                for w, v in weighted:
                    out[b, c, h] += w / total * v
    return out


def debugged(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with DLX_DEBUG=1."""
    for name in ("launches", "reference"):
        monkeypatch.setattr(import_module(f"dlx.ops.attention.{name}"), "DEBUG", True)


def astray(page: int) -> tuple[tuple[Any, ...], Tensor]:
    """A case whose second page of row 0 is `page`, and which positions see a key there [B, C]."""
    args = list(CASES["ragged rows"])
    args[2] = args[2].clone()
    args[2][0, 1] = page
    sees = torch.zeros_like(args[3], dtype=torch.bool)
    sees[0] = args[3][0] > args[1].shape[2]
    return tuple(args), sees


@pytest.mark.parametrize("case", [name for name in CASES if name != "head dim 512"])
def test_the_reference_agrees_with_plain_loops(case: str) -> None:
    args = CASES[case]
    torch.testing.assert_close(attention(*args).double(), loops(*args), rtol=1e-5, atol=1e-5)


def test_a_query_that_is_no_number_is_not_hidden() -> None:
    q, *rest = CASES["prefill"]
    q = q.clone()
    q[0, 5, 1, 3] = float("nan")
    out = attention(q, *rest)
    assert out[0, 5, 1].isnan().all() and not out[0, 5, 0].isnan().any() and not out[0, 6].isnan().any()


@pytest.mark.parametrize("page", [-1, 48, 1 << 30])
def test_a_page_outside_the_cache_makes_those_who_see_it_nan(page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    debugged(monkeypatch)
    args, sees = astray(page)
    out = attention(*args)
    assert sees.any() and not sees[0].all()
    assert out[sees].isnan().all()
    assert torch.equal(out[~sees], attention(*CASES["ragged rows"])[~sees])


def test_keys_beyond_the_page_table_make_those_who_see_them_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    debugged(monkeypatch)
    q, kv, pages, seen, *rest = CASES["one row, group of 3"]
    out = attention(q, kv, pages[:, :1].contiguous(), seen, *rest)
    assert (seen > kv.shape[2]).all() and out.isnan().all()


@pytest.mark.parametrize("value", ["1", "0", ""])
def test_the_environment_says_whether_pages_are_checked(value: str) -> None:
    code = "from dlx.ops.attention import launches; print(launches.DEBUG)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"DLX_DEBUG": value}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(value == "1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": torch.ones(2, 12, 2)}, "dtype of attention's kv with scales is torch.float32"),
        ({"first": torch.zeros(1, 4)}, "dtype of attention's first"),
        ({"hole": torch.zeros(2, 2, dtype=torch.int32)}, r"shape of attention's hole is \[2, 2\]"),
        ({"scale": 0.0}, "attention's scale is 0.0"),
    ],
)
def test_an_option_that_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    q, kv, pages, seen, scale, *_ = CASES["one row, group of 3"]
    options = {"scale": scale, "first": None, "hole": None, "scales": None} | change
    if options["scales"] is not None:
        options["scales"] = torch.ones(2, kv.shape[1], kv.shape[3])
    with pytest.raises(ShapeError, match=message):
        attention(q, kv, pages, seen, *options.values())


@pytest.mark.parametrize(("processors", "shared"), TARGETS)
@pytest.mark.parametrize("D", [16, 64, 128, 256, 512])
@pytest.mark.parametrize("kv_bytes", [1, 2, 4])
def test_the_default_configuration_fits_and_fills_the_gpu(processors: int, shared: int, D: int, kv_bytes: int) -> None:
    q_bytes = max(2, kv_bytes)
    sizes = ((1, 1, 32, 32), (1, 4, 32, 8), (1, 32, 28, 4), (16, 32, 32, 8), (1, 256, 16, 2), (1, 2048, 32, 8))
    for B, C, H, G in sizes:
        for keys in (16, 1280, 1 << 15):
            config = choose(B, C, H, G, D, keys, q_bytes, kv_bytes, processors, shared)
            assert shared_bytes(config, D, q_bytes, kv_bytes, shared >= 200 << 10) <= shared
            programs = B * G * -(-C * (H // G) // config.BM) * config.splits
            crowd = 4 if C * (H // G) > config.BM > 16 else 2
            assert config.splits == 1 or (programs <= crowd * processors and (config.splits - 1) * 64 < keys)
            assert keys < 1 << 15 or programs > processors // 2 or config.splits == 64


@pytest.mark.parametrize("processors", [4, 16, 24, 60, 132])
@pytest.mark.parametrize(("C", "H", "G"), [(32, 4, 1), (64, 2, 1), (32, 16, 2), (64, 32, 8)])
def test_a_gpu_holds_all_programs_of_a_sum(processors: int, C: int, H: int, G: int) -> None:
    """They wait for each other."""
    assert choose(1, C, H, G, 128, 1 << 15, 2, 2, processors, 227 << 10).splits <= processors


@pytest.mark.parametrize(
    ("B", "C", "G", "keys", "kv_bytes", "tile"),
    [
        (48, 4, 8, 640, 2, (16, 128)),  # many rows of few keys
        (24, 32, 8, 640, 2, (64, 32)),
        (24, 32, 8, 4096, 2, (128, 64)),
        (1, 4, 32, 528, 2, (16, 128)),  # few rows, but enough of them for one stretch each
        (1, 64, 8, 1088, 2, (16, 128)),
        (1, 4, 8, 16388, 2, (16, 64)),  # else splits
        (1, 32, 8, 16416, 1, (64, 64)),
    ],
)
def test_an_h200_gets_the_tiles_that_were_measured(
    B: int, C: int, G: int, keys: int, kv_bytes: int, tile: tuple[int, int]
) -> None:
    config = choose(B, C, 32, G, 128, keys, 2, kv_bytes, 132, 227 << 10)
    assert config[:2] == tile and (config.splits > 1) == (keys > 16000)


@pytest.mark.parametrize(
    ("C", "H", "G", "keys", "splits"),
    [
        (64, 32, 8, 4512, 8),  # four tiles of queries
        (64, 32, 8, 16800, 8),
        (32, 32, 8, 16800, 16),  # two
        (32, 32, 8, 4512, 16),
        (64, 32, 32, 3488, 8),
        (8, 32, 8, 16688, 16),  # tiles of 16 rows
        (16, 32, 8, 1376, 4),  # also where few of them are short
        (32, 16, 4, 1440, 4),
        (32, 16, 8, 1440, 4),
        (32, 32, 8, 1440, 1),
    ],
)
def test_an_h200_splits_as_was_fastest_in_the_step(C: int, H: int, G: int, keys: int, splits: int) -> None:
    assert choose(1, C, H, G, 128, keys, 2, 2, 132, 227 << 10).splits == splits


@pytest.mark.interp
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_is_right_under_any_configuration(case: str, config: Launch) -> None:
    args = CASES[case]
    torch.testing.assert_close(launch(*args, config), attention.reference(*args), rtol=1e-5, atol=1e-5)
    assert not locks(args[0].device).any()


@pytest.mark.interp
def test_splits_without_keys_add_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the splits share is not written by them, so it may hold anything."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kind: empty(*size, **kind).fill_(float("nan")))
    args = CASES["ragged rows"]
    got = launch(*args, Launch(BM=16, BN=16, splits=16, warps=4, stages=2))
    torch.testing.assert_close(got, attention.reference(*args), rtol=1e-5, atol=1e-5)


@pytest.mark.interp
@pytest.mark.parametrize("config", [*CONFIGS[:2], CONFIGS[4]], ids=str)
@pytest.mark.parametrize("page", [-1, 48, 1 << 30])
def test_the_kernel_follows_no_page_outside_the_cache(
    page: int, config: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    debugged(monkeypatch)
    args, sees = astray(page)
    got = launch(*args, config)
    assert got[sees].isnan().all()
    torch.testing.assert_close(got, attention.reference(*args), rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.interp
@pytest.mark.parametrize("case", CASES)
def test_checking_pages_changes_no_result(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = CASES[case]
    want = attention.kernel(*args)
    debugged(monkeypatch)
    assert torch.equal(attention.kernel(*args), want)


@pytest.mark.interp
def test_the_kernel_reads_no_page_table_beyond_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    debugged(monkeypatch)
    q, kv, pages, seen, *rest = CASES["one row, group of 3"]
    out = attention.kernel(q, kv, pages[:, :1].contiguous(), seen, *rest)
    assert out.isnan().all()


def on_gpu(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A case on a GPU, with queries, and pages that are not fp8, in bf16."""
    q, kv, *rest = (x.cuda() if isinstance(x, Tensor) else x for x in args)
    return q.bfloat16(), kv if kv.element_size() == 1 else kv.bfloat16(), *rest


@pytest.mark.gpu
@pytest.mark.parametrize("config", [*CONFIGS, Launch(64, 32, 2, 4, 3, full=True), Launch(128, 16, 4, 8, 2)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_is_right_under_any_configuration_on_a_gpu(case: str, config: Launch) -> None:
    args = on_gpu(CASES[case])
    q, kv, *_ = args
    if shared_bytes(config, q.shape[-1], q.element_size(), kv.element_size(), wgmma=True) > shared_limit(q):
        pytest.skip("more shared memory than there is")
    got = launch(*args, config)
    torch.testing.assert_close(got, attention.reference(*args), rtol=1e-2, atol=1e-2)
    assert torch.equal(got, launch(*args, config))
    assert not locks(args[0].device).any()


@pytest.mark.gpu
@pytest.mark.parametrize("page", [-1, 48, 1 << 30])
def test_a_gpu_follows_no_page_outside_the_cache(page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    debugged(monkeypatch)
    args, sees = astray(page)
    got = launch(*on_gpu(args), CONFIGS[0]).cpu()
    assert got[sees].isnan().all()
    assert not got[~sees].isnan().any()


@pytest.mark.gpu
def test_more_splits_than_the_gpu_holds_at_once_all_arrive() -> None:
    """Programs wait for those that add up with them; 32 times as many as run at once must still come to an end."""
    torch.manual_seed(0)
    B, W, S, G, D = 128, 8, 64, 8, 128
    kv = torch.randn(2, B * W, S, G, D, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(B, 4, 32, D, device="cuda", dtype=torch.bfloat16)
    pages = torch.randperm(B * W, device="cuda").int().view(B, W)
    seen = torch.randint(0, W * S + 1, (B, 1), device="cuda").expand(B, 4).int().contiguous()
    args = (q, kv, pages, seen, D**-0.5, None, None, None)
    one, many = (launch(*args, Launch(16, 16, splits, 4, 3)) for splits in (1, 32))
    torch.testing.assert_close(many, one, rtol=1e-2, atol=1e-2)
    for _ in range(20):
        assert torch.equal(launch(*args, Launch(16, 16, 32, 4, 3)), many)
