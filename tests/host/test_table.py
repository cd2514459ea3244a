"""The tables of the README and of the page of keys are made, and say when they are stale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools import readme

MADE = {"machine": "NVIDIA H100 80GB HBM3", "torch": "2.11.0", "triton": "3.6.0", "date": "2026-11-22", "commit": "abc"}


def record(folder: Path, name: str, results: list[dict[str, Any]], means: list[dict[str, Any]], read: float) -> None:
    path = folder / "ops" / "nvidia-h100-80gb-hbm3" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    roof = {"read_gbps": read, "matmul_tflops": 701.4}
    path.write_text(json.dumps({"made": MADE, "roof": roof, "results": results, "means": means}))


def result(case: str, rows: int, us: float, of_roof: float) -> dict[str, Any]:
    return {"case": case, "rows": rows, "us": us, "of_roof": of_roof}


def mean(rows: int, step: float | None, once: float | None = None) -> dict[str, Any]:
    return {"rows": rows, "matmuls": 0.811, "and_head": once, "step": step, "times": {"cuBLAS": 1.234, "bf16": None}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    one = [result("1 × 4 at 512", 4, 8.04, 0.123), result("1 × 4 at 2048", 4, 10.0, 0.5)]
    record(tmp_path, "attention--sdar-8b", one, [], 3100)
    record(tmp_path, "attention--dream-7b", [result("1 × 4 at 2048", 4, 9.0, 0.449)], [], 3150)
    record(tmp_path, "candidates--sdar-8b", [result("greedy", n, 400.0, 0.95) for n in (4, 32)], [], 3100)
    record(
        tmp_path, "linear--sdar-8b", [result("qkv", 4, 1.0, 0.1)], [mean(4, 0.903, 0.922), mean(64, 0.861, 0.88)], 3100
    )
    record(tmp_path, "linear_fp8--sdar-8b", [], [mean(4, None)], 3100)
    cpu = tmp_path / "ops" / "cpu"
    cpu.mkdir()
    (cpu / "ops--small.json").write_text("{}")
    return tmp_path


def test_a_table_has_a_line_a_model_and_a_column_a_case(folder: Path) -> None:
    text = readme.tables(folder / "ops", folder)
    at = "ops/nvidia-h100-80gb-hbm3"
    assert "NVIDIA H100 80GB HBM3: 3.10 to 3.15 TB/s read and 701 TFLOP/s" in text
    assert "| model | 1 × 4 at 2048 | 1 × 4 at 512 |" in text
    assert f"| [dream-7b]({at}/attention--dream-7b.json) | 9.0 µs, 45 % |  |" in text
    assert f"| [sdar-8b]({at}/attention--sdar-8b.json) | 10.0 µs, 50 % | 8.0 µs, 12 % |" in text
    assert f"| [sdar-8b]({at}/candidates--sdar-8b.json) | 400.0 µs, 95 % | 400.0 µs, 95 % |" in text
    assert text.index("**linear**") < text.index("**candidates**") < text.index("**attention**")


def test_matmuls_are_shown_once_each_and_as_a_step_runs_them(folder: Path) -> None:
    text = readme.tables(folder / "ops", folder)
    assert "| model | 4 | 64 |" in text
    assert "linear--sdar-8b.json) | 92.2 % / 90.3 %; cuBLAS 1.23 × | 88.0 % / 86.1 %; cuBLAS 1.23 × |" in text
    assert "linear_fp8--sdar-8b.json) | 81.1 %; cuBLAS 1.23 × |" in text


def test_without_records_the_table_says_how_to_make_them(tmp_path: Path) -> None:
    assert "No record yet" in readme.tables(tmp_path)


def test_families_have_a_line_each_and_what_was_loaded_is_told(tmp_path: Path) -> None:
    run = {
        "parameters": 26.1e9, "scene": {"block": 4, "context": 512}, "ms_per_forward": {"p50": 6.514}, "floor_ms": 5.2,
        "ratio": 1.253, "experts_touched": None, "floor_note": None, "read_gbps": 3170, "peak_gib": 20.04, "made": MADE,
        "prefill": {"ms": {"p50": 30.26}},
    }  # fmt: skip
    canvas = run | {"scene": {"block": 256, "context": 512}, "floor_note": "its own policy"}
    canvas |= {"experts_touched": {"mean": 99.25, "of": 128}}
    load = {"bytes": 16.4e9, "files": 4, "tensors": 1399, "load_s": 8.24, "gbps": 1.99}
    runs = {
        "b": run | {"load": load},
        "a": canvas,
        "c": {"parameters": 102.9e9, "needs_bytes": 206e9},
        "d": {"failed": ""},
    }
    for gpu in ("cpu", "nvidia-h100-80gb-hbm3"):
        (tmp_path / gpu).mkdir()
        (tmp_path / gpu / "families.json").write_text(json.dumps({"runs": runs}))
    text = readme.families(tmp_path, tmp_path)
    assert "(nvidia-h100-80gb-hbm3/families.json): one request behind 512 tokens, 3.17 TB/s read" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[2:] == [
        "| a | 26.10 | canvas of 256 | 6.51 | 5.20 | 1.25 | 99.2 of 128 | 30.3 | 20.0 |",
        "| b | 26.10 | 4 | 6.51 | 5.20 | 1.25 |  | 30.3 | 20.0 |",
        "| c | 102.90 |  | 206 GB of weights do not fit |  |  |  |  |  |",
        "| d |  |  | failed |  |  |  |  |  |",
    ]
    assert (
        "Loading a checkpoint of b's shape, just written (16.4 GB, 1,399 tensors in 4 files): 8.2 s, 1.99 GB/s." in text
    )
    assert "No record yet" in readme.families(tmp_path / "cpu")


def test_only_what_stands_between_the_marks_is_written() -> None:
    begin, end = (mark.format("ops") for mark in readme.MARKS)
    text = f"before\n{begin}\nold\n{end}\nafter\n"
    assert readme.filled(text, "ops", "new\n") == f"before\n{begin}\nnew\n{end}\nafter\n"


def test_strategies_that_suit_the_same_families_have_a_column_and_what_was_timed_is_told(tmp_path: Path) -> None:
    (tmp_path / "nvidia-h100-80gb-hbm3").mkdir()
    timed = {"scene": {"shape": "llada-8b"}, "ms_per_forward": {"p50": 6.5}}
    (tmp_path / "nvidia-h100-80gb-hbm3" / "llada-8b--b32.json").write_text(json.dumps(timed))
    lines = readme.models(tmp_path).splitlines()
    assert lines[0].startswith("- **A** `single_bd`, `multi_bd`, ")
    assert lines[2] == "- **C** `diffusion_gemma`"
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:]] for line in lines[5:]}
    assert cells["llada"][:7] == ["✓", "✓", "", "", "`fast_dllm_v1`", "random weights", "llada-8b"]
    assert cells["sdar"][5:7] == ["trained (bundled) and random weights", "not yet"]
    assert cells["diffusion_gemma"][:4] == ["", "", "✓", ""]


def test_the_pages_are_not_stale(capsys: pytest.CaptureFixture[str]) -> None:
    assert readme.main(["--check"]) == 0, capsys.readouterr().out


def test_a_stale_readme_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    begin, end = readme.MARKS
    (tmp_path / "docs").mkdir()
    older = f"{begin}\nsomething older\n{end}\n"
    (tmp_path / "README.md").write_text("".join(older.format(name, name) for name in ("models", "families")))
    pages = {"performance": "ops", "keys": "keys"}
    for page, name in pages.items():
        (tmp_path / "docs" / f"{page}.md").write_text(older.format(name, name))
    assert readme.main(["--check"]) == 1
    said = capsys.readouterr().out
    assert all(f"{page} is stale" in said for page in ("README.md", "docs/performance.md", "docs/keys.md"))
    assert readme.main([]) == 0
    assert readme.main(["--check"]) == 0
