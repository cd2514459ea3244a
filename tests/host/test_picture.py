"""The roofline is drawn from records: where points lie, and that the picture in the README is small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools import picture

RUNS = Path(__file__).parents[2] / "profiles"


def record(folder: Path, name: str, **value: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(value))


def test_a_kernel_lies_where_its_flops_bytes_and_time_put_it(tmp_path: Path) -> None:
    results = [{"flops": 2e9, "bytes": 5e8, "us": 100.0, "of_roof": 0.5}, {"flops": 0, "bytes": 1, "us": 1.0}]
    record(tmp_path, "linear--small", roof={"read_gbps": 3000, "matmul_tflops": 700}, results=results)
    points, read, rate = picture.kernels(tmp_path)
    assert points == [picture.Point("linear", 4.0, 20.0, 0.5)]
    assert (read, rate) == (3.0, 700)


def test_steps_are_those_that_were_timed(tmp_path: Path) -> None:
    record(tmp_path, "a--b4", ratio_with_kv=1.25)
    record(tmp_path, "a--startup", ratio_with_kv=None)
    assert picture.steps(tmp_path) == [picture.Step("a--b4", 1.25)]


def test_without_records_the_tool_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"dlx\.ops\.bench --json profiles/ops"):
        picture.kernels(tmp_path)


def test_the_records_are_drawn_as_a_small_picture(tmp_path: Path) -> None:
    assert picture.main(["--png", str(tmp_path / "roofline.png")]) == 0
    for path in (tmp_path / "roofline.png", RUNS / "ops" / picture.GPU / "roofline.png"):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert path.stat().st_size < 100_000
