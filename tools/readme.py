"""Write the tables of the README, docs/performance.md and docs/keys.md.

Of ops from the records in profiles/ops, of families from those in profiles/runs, of models and strategies from the
tables of both and what binds, of the field's keys from dlx.harness.keys.

python tools/readme.py          rewrites what stands between the marks
python tools/readme.py --check  says whether a page is stale, and exits with 1 if one is
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlx.harness.keys import Key
    from dlx.models.card import Card

ROOT = Path(__file__).parents[1]
MARKS = "<!-- {}:begin, by tools/readme.py -->", "<!-- {}:end -->"
NONE = "No record yet: `python -m dlx.ops.bench --json profiles/ops` on a GPU writes them.\n"
NO_FAMILY = "No record yet: `python tools/families.py --json profiles/runs/GPU/families.json` on a GPU writes it.\n"
COLUMNS = ("G parameters", "block", "ms a forward", "floor", "÷ floor", "experts a layer", "prefill, ms", "peak GiB")

Record = dict[str, Any]
# what a table says of an op; ops in this order
TITLES = {
    "linear": "**linear**: a layer's matmuls and the head, each once / as in a step, share of read bandwidth; rows:",
    "linear_fp8": "**linear, fp8 weights**: a layer's matmuls, share of read bandwidth by traffic; rows:",
    "candidates": "**candidates**: head and sampler, greedy; rows:",
    "candidates_topk": "**candidates**: the same with lists of the k likeliest ids; k, rows:",
    "attention": "**attention**: requests × queries at keys before them",
    "attention_fp8": "**attention, fp8 K/V**: requests × queries at keys before them; what bf16 takes of it",
    "kv_store": "**kv_store**: requests × positions",
    "moe": "**moe**: route and experts; the roof is for the experts really touched; tokens:",
}


def records(folder: Path) -> dict[str, dict[str, dict[str, Record]]]:
    """GPU → op → model → record, of <folder>/<gpu>/<op>--<model>.json; those of a CPU have no roof and are left out."""
    found: dict[str, dict[str, dict[str, Record]]] = {}
    for path in sorted(folder.glob("*/*--*.json")):
        if path.parent.name != "cpu":
            op, model = path.stem.split("--", 1)
            found.setdefault(path.parent.name, {}).setdefault(op, {})[model] = json.loads(path.read_text())
    return found


def tables(folder: Path, root: Path = ROOT, up: str = "") -> str:
    """The records in `folder`, as tables; links are relative to `root`, behind `up`."""
    gpus = records(folder)
    if not gpus:
        return NONE
    parts = []
    for gpu, ops in gpus.items():
        made = [record["made"] for models in ops.values() for record in models.values()]
        roofs = [record["roof"] for models in ops.values() for record in models.values()]
        parts.append(
            f"{made[0]['machine']}: {span(r['read_gbps'] / 1e3 for r in roofs)} TB/s read and "
            f"{span((r['matmul_tflops'] for r in roofs), 0)} TFLOP/s of a large bf16 matmul in the runs themselves; "
            f"cells are microseconds and the share of whichever roof binds. {versions(made)}.\n"
        )
        at = up + (folder / gpu).relative_to(root).as_posix()
        parts += [table(op, ops[op], at) for op in [*TITLES, *sorted(set(ops) - set(TITLES))] if op in ops]
    return "\n".join(parts)


def table(op: str, models: dict[str, Record], at: str) -> str:
    """One op: a line a model, a column a case."""
    cells = {model: (steps if op.startswith("linear") else cases)(record) for model, record in models.items()}
    columns = list(dict.fromkeys(name for row in cells.values() for name in row))
    lines = [TITLES.get(op, f"**{op}**"), "", row("model", columns), row("---", ["---:"] * len(columns))]
    for model, known in cells.items():
        lines.append(row(f"[{model}]({at}/{op}--{model}.json)", [known.get(name, "") for name in columns]))
    return "\n".join(lines) + "\n"


def row(first: str, rest: Iterable[str]) -> str:
    return f"| {first} | " + " | ".join(rest) + " |"


def steps(record: Record) -> dict[str, str]:
    """Rows → share of read bandwidth of each matrix once and over a step, and how cuBLAS compares."""
    cells = {}
    for mean in record["means"]:
        shares = [mean["matmuls"]] if mean["step"] is None else [mean["and_head"], mean["step"]]
        times = [f"{name} {ratio:.2f} ×" for name, ratio in mean["times"].items() if ratio is not None]
        cells[str(mean["rows"])] = "; ".join([" / ".join(f"{100 * share:.1f} %" for share in shares), *times])
    return cells


def cases(record: Record) -> dict[str, str]:
    """Case, and its rows where cases of one name differ in them → microseconds and share of the roof."""
    results = record["results"]
    unique = len({r["case"] for r in results}) == len(results)
    alike = len({r["case"] for r in results}) == 1
    cells = {}
    for r in results:
        name = r["case"] if unique else str(r["rows"]) if alike else f"{r['case']}, {r['rows']}"
        beside = r.get("others", {}).get("bf16")
        other = "" if beside is None else f"; bf16 {beside / r['us']:.2f} ×"
        cells[name] = f"{r['us']:.1f} µs, {100 * r['of_roof']:.0f} %{other}"
    return cells


def families(folder: Path, root: Path = ROOT) -> str:
    """What the README shows of <folder>/<gpu>/families.json: a line a shape; links are relative to `root`."""
    parts = []
    for path in sorted(folder.glob("*/families.json")):
        runs: dict[str, Record] = json.loads(path.read_text())["runs"]
        timed = [run for run in runs.values() if "ms_per_forward" in run]
        if path.parent.name == "cpu" or not timed:
            continue
        context, made = timed[0]["scene"]["context"], [run["made"] for run in timed]
        parts.append(
            f"{made[0]['machine']}, [records]({path.relative_to(root).as_posix()}): one request behind {context} "
            f"tokens, {span(run['read_gbps'] / 1e3 for run in timed)} TB/s read in the same runs. {versions(made)}.\n"
        )
        lines = [row("shape", COLUMNS), row("---", ["---:"] * len(COLUMNS))]
        parts.append("\n".join([*lines, *(row(name, one(runs[name])) for name in sorted(runs))]) + "\n")
        loads = {name: run["load"] for name, run in runs.items() if "load" in run}
        parts += [
            f"Loading a checkpoint of {name}'s shape, just written ({load['bytes'] / 1e9:.1f} GB, {load['tensors']:,} "
            f"tensors in {load['files']} files): {load['load_s']:.1f} s, {load['gbps']:.2f} GB/s.\n"
            for name, load in sorted(loads.items())
        ]
    return "\n".join(parts) or NO_FAMILY


def one(run: Record) -> list[str]:
    """The cells of a family."""
    said = [f"{run['parameters'] / 1e9:.2f}" if "parameters" in run else ""]
    if "ms_per_forward" not in run:
        why = f"{run['needs_bytes'] / 1e9:.0f} GB of weights do not fit" if "needs_bytes" in run else "failed"
        return [*said, "", why if "load" not in run else "", *[""] * 5]
    experts = run["experts_touched"]
    return [
        *said,
        f"canvas of {run['scene']['block']}" if run["floor_note"] else str(run["scene"]["block"]),
        f"{run['ms_per_forward'].get('mean', run['ms_per_forward']['p50']):.2f}",  # older: one kind of forward
        f"{run['floor_ms']:.2f}",
        f"{run['ratio']:.2f}",
        f"{experts['mean']:.1f} of {experts['of']}" if experts else "",
        f"{run['prefill']['ms']['p50']:.1f}",
        f"{run['peak_gib']:.1f}",
    ]


def models(folder: Path) -> str:
    """Which strategies decode which families, and what is known of them; strategies that suit the same are a column.

    folder  of records, profiles/runs: whose shapes count as measured
    """
    from dlx.graphs.policies import POLICIES
    from dlx.models.families import FAMILIES

    cards = shapes()
    fits = {p: tuple(f for f, mine in cards.items() if any(binds(p, card) for card in mine.values())) for p in POLICIES}
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, suits in fits.items():
        groups.setdefault(suits, []).append(name)
    letters = dict(zip(groups, "ABCDEFGH", strict=False))
    lines = [f"- **{letters[suits]}** {', '.join(f'`{name}`' for name in many)}" for suits, many in groups.items()]
    columns = [*letters.values(), "own", "checked with", "step measured", "checkpoints"]
    lines += ["", row("family", columns), row("---", [*[":---:"] * len(letters), *["---"] * 4])]
    timed = measured(folder)
    for facts in FAMILIES.values():
        mine = cards[facts.name]
        marks = ["✓" if facts.name in suits else "" for suits in groups]
        seen = ", ".join(name for name in mine if name in timed) or "not yet"
        lines.append(row(facts.name, [*marks, f"`{facts.policy}`", facts.checked, seen, facts.repos]))
    return "\n".join(lines) + "\n"


def shapes() -> dict[str, dict[str, Card]]:
    """Family → name → card of the shapes that dlx knows."""
    from dlx.bench.arguments import SHAPES
    from dlx.models.card import Card

    found: dict[str, dict[str, Card]] = {}
    for path in sorted(SHAPES.glob("*.json")):
        card = Card.from_hf(json.loads(path.read_text()), {})
        found.setdefault(card.family, {})[path.stem] = card
    return found


def measured(folder: Path) -> set[str]:
    """Names of the shapes whose step was timed on a GPU."""
    names = set()
    for path in folder.glob("*/*.json"):
        record: Record = json.loads(path.read_text()) if path.parent.name != "cpu" else {}
        if "ms_per_forward" in record:
            names.add(record["scene"]["shape"])
        names |= {name for name, run in record.get("runs", {}).items() if "ms_per_forward" in run}
    return names


def binds(policy: str, card: Card) -> bool:
    """Whether a policy decodes a checkpoint, with the block length that it was trained for."""
    from dlx.config import bind
    from dlx.errors import PolicyError
    from dlx.graphs.policies import POLICIES

    try:
        bind(POLICIES[policy], card, None)
    except PolicyError:
        return False
    return True


def keys() -> str:
    """The field's keys, group by group."""
    from dlx.harness.keys import ENGINE, EVAL, PROFILER

    parts = []
    for title, section in (("`engine:`", ENGINE), ("`eval:`", EVAL), ("`profiler_config`", PROFILER)):
        for group in dict.fromkeys(key.group for key in section.values()):
            mine = {name: key for name, key in section.items() if key.group == group}
            parts.append(f"### {group} ({title})\n\n{rows(mine)}")
    return "\n".join(parts)


def rows(section: Mapping[str, Key]) -> str:
    """A line a key: the field of dlx that takes it, and how, or why there is none."""
    lines = [row("key", ["in dlx", "how"]), row("---", ["---", "---"])]
    for name, key in section.items():
        allowed = " or ".join(f"`{'null' if value is None else value}`" for value in key.only)
        only = f"{allowed} alone is accepted" if key.only and not key.to else ""
        lines.append(row(f"`{name}`", [f"`{key.to}`" if key.to else "", "; ".join(filter(None, (key.why, only)))]))
    return "\n".join(lines).replace("|  |", "| |") + "\n"


def span(values: Iterable[float], digits: int = 2) -> str:
    """The extremes of some numbers, or the one that they all are."""
    said = sorted({f"{value:.{digits}f}" for value in values}, key=float)
    return said[0] if len(said) == 1 else f"{said[0]} to {said[-1]}"


def versions(made: Sequence[Record]) -> str:
    """With what the records were made, and when."""
    dates, torch, triton = (sorted({m[key] for m in made}) for key in ("date", "torch", "triton"))
    return f"Torch {', '.join(torch)}, Triton {', '.join(triton)}, {', '.join(dates)}"


def filled(readme: str, name: str, block: str) -> str:
    """The README with the block between the marks of that name."""
    begin, end = (mark.format(name) for mark in MARKS)
    head, rest = readme.split(begin)
    _, tail = rest.split(end)
    return f"{head}{begin}\n{block}{end}{tail}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a table is stale")
    args = parser.parse_args(argv)
    runs = ROOT / "profiles" / "runs"
    pages = {
        "README.md": {"models": models(runs), "families": families(runs)},
        "docs/performance.md": {"ops": tables(ROOT / "profiles" / "ops", ROOT, "../")},
        "docs/keys.md": {"keys": keys()},
    }
    stale = False
    for page, parts in pages.items():
        path = ROOT / page
        before = after = path.read_text()
        for name, block in parts.items():
            after = filled(after, name, block)
        if not args.check:
            path.write_text(after)
        elif after != before:
            print(f"{page} is stale: run python tools/readme.py")
            stale = True
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
