"""The tools' command lines: what they print, what they write, what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dlx.bench.arguments import SHAPES
from tools import bench, roofline

HERE = ["--shape", "nano", "--block", "16", "--context", "64", "--device", "cpu"]


def test_latency_prints_a_line_and_writes_its_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "runs" / "nano.json"
    assert bench.main(["latency", *HERE, "--graphs", "off", "--steps", "4", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    record = json.loads(path.read_text())
    assert out.count("\n") == 1 and f"{record['ms_per_forward']['mean']:.3f} ms a forward" in out
    assert record["made"]["command"].startswith("python tools/bench.py latency --shape nano")


def test_throughput_runs_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["throughput", *HERE, "--requests", "2", "--max-tokens", "16"]) == 0
    assert "32 tokens in" in capsys.readouterr().out


def test_the_roofline_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "roof.json"
    assert roofline.main([*HERE, "--json", str(path)]) == 0
    assert "accumulate" in capsys.readouterr().out
    assert json.loads(path.read_text())["what"] == "roofline"


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["latency", "--shape", "llada-9b"], "known shapes are diffucoder-7b, "),
        (["latency", *HERE, "--requests", "0"], "--requests 0"),
        (["latency", *HERE, "--graphs", "capture"], "CUDA"),
        (["throughput", *HERE, "--max-tokens", "100000"], "max_model_len"),
    ],
)
def test_what_cannot_be_measured_is_refused(argv: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(argv) == 2
    assert told in capsys.readouterr().err


def test_every_shape_of_the_tools_is_one_that_dlx_can_build() -> None:
    from dlx.models.card import Card

    for path in SHAPES.glob("*.json"):
        assert Card.from_hf(json.loads(path.read_text()), {}).layers > 0
