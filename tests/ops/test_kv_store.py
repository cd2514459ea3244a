"""Norm, rope and the store into pages: the reference against torch's own norm, complex numbers and fp8 tables."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dlx.errors import ShapeError
from dlx.ops.kv_store import kv_store

CASES = kv_store.cases()
PLAIN = [name for name in CASES if CASES[name][5].dtype == torch.float32]


def spun(x: Tensor, pos: Tensor, frequencies: Tensor) -> Tensor:
    """Rope: channel j and j + R/2 are a complex number that turns by pos · frequencies[j]."""
    half = frequencies.shape[0]
    angle = (pos[..., None, None] * frequencies).double()
    z = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double()) * torch.polar(
        torch.ones_like(angle), angle
    )
    return torch.cat((z.real, z.imag, x[..., 2 * half :].double()), -1)


def parts(args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """q', k' and v' of a case, in fp64."""
    qkv, q_gain, k_gain, pos, frequencies, kv, _, _, eps, _, v_norm = args
    G, D = kv.shape[3:]
    q, k, v = (x.double() for x in qkv.split((qkv.shape[2] - 2 * G, G, G), 2))
    if q_gain is not None:
        q, k = F.rms_norm(q, (D,), q_gain.double(), eps), F.rms_norm(k, (D,), k_gain.double(), eps)
    return spun(q, pos, frequencies), spun(k, pos, frequencies), F.rms_norm(v, (D,), eps=eps) if v_norm else v


def fresh(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The case with inputs and pages of its own."""
    return args[0].clone(), *args[1:5], args[5].clone(), *args[6:]


def debugged(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with DLX_DEBUG=1."""
    for name in ("kernels", "reference"):
        monkeypatch.setattr(import_module(f"dlx.ops.kv_store.{name}"), "DEBUG", True)


def astray(page: int) -> tuple[Any, ...]:
    """A case whose row 0 writes into `page`."""
    args = list(fresh(CASES["dense"]))
    args[6] = args[6].clone()
    args[6][0, 0] = page
    return tuple(args)


@pytest.mark.parametrize("case", PLAIN)
def test_the_reference_agrees_with_complex_rotation_and_writes_where_it_should(case: str) -> None:
    args = fresh(CASES[case])
    pos, kv, pages, seen = args[3], args[5], args[6], args[7]
    q, k, v = parts(args)
    want = kv.double()
    for b in range(pos.shape[0]):
        for c in range(pos.shape[1]):
            at = int(pos[b, c])
            if seen[b, c] > at:
                page = int(pages[b, at // kv.shape[2]])
                want[0, page, at % kv.shape[2]] = k[b, c]
                want[1, page, at % kv.shape[2]] = v[b, c]
    torch.testing.assert_close(kv_store(*args).double(), q, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kv.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", sorted(set(CASES) - set(PLAIN)))
def test_a_stored_value_is_the_nearest_that_fp8_has(case: str) -> None:
    args = fresh(CASES[case])
    pos, kv, pages, scales = args[3], args[5], args[6], args[9]
    codes = torch.arange(256, dtype=torch.uint8).view(kv.dtype).float()
    finite = codes[codes.isfinite()].double().unique()
    kv_store(*args)
    for i, x in enumerate(parts(args)[1:]):
        for b in range(pos.shape[0]):
            for c in range(pos.shape[1]):
                page, inner = int(pages[b, pos[b, c] // kv.shape[2]]), int(pos[b, c] % kv.shape[2])
                exact = (x[b, c] / scales[i, page, :, None]).clamp(finite[0], finite[-1])
                least = (exact[..., None] - finite).abs().amin(-1)
                missed = (exact - kv[i, page, inner].double()).abs()
                assert (missed <= least * (1 + 1e-5)).all()
    assert (kv.float().abs() == finite[-1]).any()  # some were out of range


def test_all_is_rotated_in_full_precision_and_rounded_once() -> None:
    args = list(fresh(CASES["no norm"]))
    args[0], args[5] = args[0].bfloat16(), args[5].bfloat16()
    args[3] = args[3] + 1000  # an angle whose cosine bf16 would spoil
    args[7] = torch.zeros_like(args[7])
    q, _, _ = parts(tuple(args))
    wide = kv_store(*args).double()
    assert ((wide - q).abs() <= q.abs() * 2**-8).all()


@pytest.mark.parametrize("broken", ["page below 0", "position below 0"])
def test_what_has_no_place_is_not_stored(broken: str) -> None:
    args = list(astray(-1) if broken == "page below 0" else fresh(CASES["dense"]))
    if broken == "position below 0":
        args[3] = args[3].clone()
        args[3][0] -= 4
    untouched = args[5].clone()
    row = untouched.clone()
    kv_store.reference(*fresh(CASES["dense"])[:5], row, *CASES["dense"][6:])
    kv_store(*args)
    for i, page in enumerate(CASES["dense"][6].tolist()):
        where = torch.tensor(page)
        assert torch.equal(args[5][:, where], untouched[:, where] if i == 0 else row[:, where])


@pytest.mark.parametrize("page", [6, 1 << 30])
def test_a_page_outside_the_cache_is_not_written_and_poisons_its_positions(
    page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    debugged(monkeypatch)
    args = astray(page)
    pages, kv = CASES["dense"][6], args[5].clone()
    out = kv_store(*args)
    assert out[0].isnan().all() and not out[1].isnan().any()
    assert torch.equal(args[5][:, pages[0].long()], kv[:, pages[0].long()])


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (1, None, "kv_store's q_gain and k_gain"),
        (4, torch.ones(17), "length of kv_store's frequencies is 17; expected 1 to D / 2 = 16"),
        (9, torch.ones(2, 6, 2), "dtype of kv_store's kv with scales is torch.float32"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(at: int, value: Tensor | None, message: str) -> None:
    args = list(CASES["dense"])
    args[at] = value
    with pytest.raises(ShapeError, match=message):
        kv_store(*args)


@pytest.mark.interp
@pytest.mark.parametrize("page", [-1, 6, 1 << 30])
def test_the_kernel_writes_into_no_page_outside_the_cache(page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    debugged(monkeypatch)
    args, other = astray(page), astray(page)
    want, got = kv_store.reference(*other), kv_store.kernel(*args)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(args[5], other[5], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_value_that_is_no_number_stays_so_in_fp8_pages(device: str) -> None:
    args = [x.to(device) if isinstance(x, Tensor) else x for x in fresh(CASES["e4m3 pages"])]
    args[0][0, 0, -1, 3] = float("nan")
    kv_store(*args)
    page = CASES["e4m3 pages"][6][0, 0]
    assert args[5][1, page, 0, -1, 3].float().isnan()
    assert int(args[5].float().isnan().sum()) == 1
