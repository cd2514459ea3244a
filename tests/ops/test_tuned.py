"""Recorded launch configurations: which one is found, and that a bad file changes nothing but the log."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from dlx.ops import tuned as records
from dlx.ops.tuned import tuned
from dlx.provenance import slug


class Launch(NamedTuple):
    BN: int
    splits: int
    warps: int
    fused: bool = False


CODE = Launch(64, 1, 4)
GPU = "NVIDIA H100 80GB HBM3"
Write = Callable[..., Path]


def config(BN: int, splits: Any = 2, warps: int = 4, fused: Any = False) -> dict[str, Any]:
    return {"BN": BN, "splits": splits, "warps": warps, "fused": fused}


CONFIGS = [
    {"key": [4, 512, 256], "config": config(16)},
    {"key": [32, 512, 256], "config": config(32), "us": 3.5},
    {"key": [16, 512, 999], "config": config(256)},
]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes the records of a pretended H100; each test has its own folder, so nothing is remembered."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: GPU)
    monkeypatch.setattr(records, "folder", lambda: tmp_path)

    def file(text: str | None = None, **changes: Any) -> Path:
        path = tmp_path / slug(GPU) / "matmul.json"
        path.parent.mkdir(exist_ok=True)
        value = {"schema": 1, "op": "matmul", "gpu": GPU, "configs": CONFIGS, "default": None} | changes
        path.write_text(json.dumps(value) if text is None else text)
        return path

    return file


@pytest.mark.parametrize(
    ("key", "BN"),
    [
        ((4, 512, 256), 16),
        ((32, 512, 256), 32),
        ((5, 512, 256), 16),
        ((31, 512, 256), 32),
        ((8, 512, 256), 16),
        ((16, 512, 256), 32),
        ((200, 512, 256), 32),
        ((3, 512, 256), 16),
        ((1, 512, 256), 64),  # none of more than twice the rows
        ((16, 512, 255), 64),
        ((16, 512), 64),
        ((17, 512, 999), 256),
    ],
)
def test_the_exact_key_wins_then_the_nearest_rows_then_the_code(write: Write, key: tuple[int, ...], BN: int) -> None:
    write()
    assert tuned("matmul", key, CODE) == (Launch(BN, 2, 4) if BN != 64 else CODE)


def test_the_default_of_the_file_comes_before_that_of_the_code(write: Write) -> None:
    write(default=config(128, 3))
    assert tuned("matmul", (8, 1, 1), CODE) == Launch(128, 3, 4)
    assert tuned("matmul", (8, 512, 256), CODE) == Launch(16, 2, 4)


def test_a_gpu_without_records_takes_the_code_in_silence(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    assert tuned("matmul", (4, 512, 256), CODE) == CODE
    assert not caplog.records


def test_a_gpu_of_the_same_processor_lends_its_records_where_there_are_none(
    write: Write, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert tuned("matmul", (4, 512, 256), CODE) == Launch(16, 2, 4)
    own = path.parents[1] / "nvidia-h200" / path.name
    own.parent.mkdir()
    entry = {"key": [4, 512, 256], "config": config(128)}
    own.write_text(json.dumps({"schema": 1, "op": "matmul", "gpu": "NVIDIA H200", "configs": [entry], "default": None}))
    records.read.cache_clear()
    assert tuned("matmul", (4, 512, 256), CODE) == Launch(128, 2, 4)
    assert tuned("matmul", (16, 512, 999), CODE) == Launch(256, 2, 4)
    assert tuned("matmul", (8, 512, 256), CODE) == Launch(128, 2, 4)
    assert tuned("matmul", (32, 512, 256), CODE) == Launch(32, 2, 4)  # lent for these rows, before one's own for fewer
    assert not caplog.records


def test_without_a_gpu_no_file_is_looked_at(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(records, "read", None)
    assert tuned("matmul", (4, 512, 256), CODE) == CODE


def test_a_file_is_read_once(write: Write) -> None:
    path = write()
    first = tuned("matmul", (4, 512, 256), CODE)
    path.unlink()
    assert tuned("matmul", (4, 512, 256), CODE) == first
    assert tuned("matmul", (4, 512, 256), Launch(32, 8, 8)) == first  # whatever the code's default is


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"text": "{"}, "cannot be read"),
        ({"text": "[]"}, "not of schema 1"),
        ({"text": "\x00\xff"}, "cannot be read"),
        ({"schema": 2}, "not of schema 1"),
        ({"op": "attention"}, "of the op 'attention', not 'matmul'"),
        ({"gpu": "NVIDIA A100-SXM4-80GB"}, "of the GPU 'NVIDIA A100-SXM4-80GB'"),
        ({"configs": {}}, "its configs are no list"),
    ],
)
def test_a_corrupted_or_foreign_file_is_passed_over_with_one_warning(
    write: Write, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], fault: str
) -> None:
    path = write(**changes)
    for rows in (4, 32, 64):
        assert tuned("matmul", (rows, 512, 256), CODE) == CODE
    (said,) = caplog.records
    assert said.levelno == logging.WARNING
    assert str(path) in said.getMessage() and fault in said.getMessage()


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ({"key": [32, 512, 256], "config": config(0)}, "has BN = 0; it is 1 or above"),
        ({"key": [32, 512, 256], "config": config(-64)}, "has BN = -64"),
        ({"key": [32, 512, 256], "config": config(48)}, "has BN = 48; it is a power of two"),
        ({"key": [32, 512, 256], "config": config(32, splits=0)}, "has splits = 0; it is 1 or above"),
        ({"key": [32, 512, 256], "config": config(32, splits=2.0)}, "has splits = 2.0, which is no int"),
        ({"key": [32, 512, 256], "config": config(32, splits=True)}, "has splits = True, which is no int"),
        ({"key": [32, 512, 256], "config": config(32, fused=1)}, "has fused = 1, which is no bool"),
        ({"key": [32, 512, 256], "config": config(32, warps=3)}, "has warps = 3; it is a power of two"),
        ({"key": [32, 512, 256], "config": config(32, warps=64)}, "has warps = 64; it is 32 at most"),
        ({"key": [32, 512, 256], "config": {"BN": 32}}, "has not the fields BN, splits, warps, fused"),
        ({"key": [32, 512, 256], "config": config(32) | {"BK": 8}}, "has not the fields"),
        ({"key": [32, 512, 256]}, "has not the fields"),
        ({"key": "32", "config": config(32)}, "'32' is no key"),
        ({"key": [], "config": config(32)}, "is no key"),
        ({"key": [32, -1], "config": config(32)}, "is no key"),
        ({"key": [0, 512, 256], "config": config(32)}, "is no key"),
        (17, "None is no key"),
    ],
)
def test_an_impossible_entry_is_passed_over_with_one_warning_and_the_others_hold(
    write: Write, caplog: pytest.LogCaptureFixture, entry: Any, fault: str
) -> None:
    write(configs=[CONFIGS[0], entry, CONFIGS[2], entry], default={"BN": 1})
    for rows in (32, 64):
        assert tuned("matmul", (rows, 512, 256), CODE) == Launch(16, 2, 4)
    (said,) = caplog.records
    assert fault in said.getMessage()


def test_a_configuration_that_does_not_fit_the_gpu_is_passed_over_with_one_warning(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    write(default=config(128))
    fits = lambda config: config.BN < 32  # noqa: E731
    assert tuned("matmul", (32, 512, 256), CODE, fits) == Launch(16, 2, 4)
    assert tuned("matmul", (16, 512, 999), CODE, fits) == CODE
    (said,) = caplog.records
    assert "does not fit this GPU" in said.getMessage()


def test_records_are_found_inside_an_installed_package_and_beside_one_in_a_checkout(tmp_path: Path) -> None:
    package = tmp_path / "site" / "dlx"
    package.mkdir(parents=True)
    assert records.folder(package) == tmp_path / "site" / "profiles" / "kernels"
    shipped = package / "profiles" / "kernels"
    shipped.mkdir(parents=True)
    assert records.folder(package) == shipped
    assert records.folder().parents[1] == Path(__file__).parents[2]


def recorded() -> list[Path]:
    return sorted(records.folder().glob("*/*.json"))


@pytest.mark.parametrize("path", recorded(), ids=[f"{path.parent.name}: {path.stem}" for path in recorded()])
def test_a_shipped_file_says_where_it_comes_from(path: Path) -> None:
    value = json.loads(path.read_text())
    assert (value["schema"], value["op"], slug(value["gpu"])) == (1, path.stem, path.parent.name)
    assert {"commit", "torch", "triton", "date", "command", "machine"} <= set(value["made"])
    assert value["configs"] and len({len(entry["key"]) for entry in value["configs"]}) == 1
