"""Draw the roofline of a GPU from its records: kernels of profiles/ops under both roofs, steps of profiles/runs.

python tools/picture.py                     writes profiles/ops/<gpu>/roofline.png
python tools/picture.py --png FILE --gpu nvidia-h100-80gb-hbm3
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
GPU = "nvidia-h100-80gb-hbm3"
COLOURS = {
    "linear": "tab:blue",
    "linear_fp8": "tab:cyan",
    "candidates": "tab:orange",
    "attention": "tab:green",
    "kv_store": "tab:olive",
    "moe": "tab:red",
}

Record = Mapping[str, Any]


class Point(NamedTuple):
    """A kernel of a shape: flops a byte of the least traffic, TFLOP/s reached, and the share of the roof over it."""

    op: str
    intensity: float
    tflops: float
    share: float


class Step(NamedTuple):
    """One captured step against the time in which its weights and the K/V of its context are read once."""

    name: str
    ratio: float


def kernels(folder: Path) -> tuple[list[Point], float, float]:
    """(points, TB/s read, TFLOP/s of a large matmul) of the records <op>--<model>.json of a GPU's folder."""
    points, reads, rates = [], [], []
    for path in sorted(folder.glob("*--*.json")):
        record: Record = json.loads(path.read_text())
        reads.append(record["roof"]["read_gbps"] / 1e3)
        rates.append(record["roof"]["matmul_tflops"])
        op = path.stem.split("--")[0]
        for one in record["results"]:
            if one["flops"] > 0:
                tflops = one["flops"] / one["us"] / 1e6
                points.append(Point(op, one["flops"] / one["bytes"], tflops, one["of_roof"]))
    if not points:
        raise SystemExit(f"{folder} has no records; python -m dlx.ops.bench --json profiles/ops writes them on a GPU")
    return points, max(reads), max(rates)


def steps(folder: Path) -> list[Step]:
    """Steps of the records of a GPU's folder, in the order of their names."""
    records = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*--*.json"))}
    return [Step(name, one["ratio_with_kv"]) for name, one in records.items() if one.get("ratio_with_kv")]


def drawn(points: Sequence[Point], read: float, rate: float, ran: Sequence[Step], machine: str) -> Figure:
    """Kernels under the roofs on the left, what steps take of theirs on the right."""
    figure = Figure(figsize=(11, 4.4), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.6, 1))
    edge = rate / read
    ends = min(p.intensity for p in points) / 2, max(edge, *(p.intensity for p in points)) * 2
    left.plot([ends[0], edge, ends[1]], [ends[0] * read, rate, rate], color="black", linewidth=1)
    left.text(edge, rate * 1.08, f"{rate:.0f} TFLOP/s", va="bottom", ha="left", fontsize="small")
    left.text(ends[0] * 1.3, ends[0] * read * 2.4, f"{read:.2f} TB/s", rotation=33, fontsize="small")
    for op, colour in COLOURS.items():
        mine = [p for p in points if p.op == op]
        if mine:
            label = f"{op}: {100 * min(p.share for p in mine):.0f} to {100 * max(p.share for p in mine):.0f} %"
            left.scatter(
                [p.intensity for p in mine], [p.tflops for p in mine], s=9, color=colour, label=label, alpha=0.7
            )
    left.set(xscale="log", yscale="log", xlabel="flops a byte of the least traffic", ylabel="TFLOP/s", title=machine)
    left.legend(fontsize="small", title="share of the roof above", title_fontsize="small")
    left.grid(alpha=0.3)
    names = [one.name for one in ran]
    right.barh(names, [100 / one.ratio for one in ran], color="tab:blue")
    right.invert_yaxis()
    right.set(xlim=(0, 100), xlabel="weights and K/V read once, in % of the time", title="captured steps")
    right.tick_params(axis="y", labelsize="small")
    right.grid(alpha=0.3, axis="x")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default=GPU, help="folder of the records, below profiles/ops and profiles/runs")
    parser.add_argument("--png", type=Path, help="file to write")
    args = parser.parse_args(argv)
    folder = ROOT / "profiles" / "ops" / args.gpu
    points, read, rate = kernels(folder)
    machine = json.loads(next(folder.glob("*--*.json")).read_text())["made"]["machine"]
    figure = drawn(points, read, rate, steps(ROOT / "profiles" / "runs" / args.gpu), machine)
    figure.savefig(args.png or folder / "roofline.png", metadata={"Software": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
