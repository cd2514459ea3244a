"""Accuracy against tokens per forward: policies, each swept over one of its numbers, on the bundled tasks."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from dlx.errors import ConfigError, PolicyError
from dlx.evals import Decoder, Record, evaluate
from dlx.graphs.policies import Policy, named

# what is drawn if nothing is named: the field's setting of several blocks, the one that the trainer decodes with, and
# edits on two blocks, each of which ends once it is sure of all its tokens
LINES = (
    "single_bd", "multi_bd", "multi_bd:N=2,open_at=0.5,force_at=1.0", "edit:N=2,edit=0.4,settle.sure=0.9",
)  # fmt: skip
THRESHOLDS = (0.6, 0.7, 0.8, 0.9, 0.95)
DROP, STEEP = 5.0, 3.0  # AUP: percent of accuracy under which points do not count, and how lost accuracy weighs
SCHEMA = 1

Json = dict[str, Any]  # Any, as records nest


class Line(NamedTuple):
    """One curve of a frontier: a policy for each value of what is swept."""

    name: str  # as it was asked for
    swept: str  # a field of the policy, or of a rule, as `select.k`
    policies: dict[float, Policy]


def line(text: str, thresholds: Sequence[float] = THRESHOLDS) -> Line:
    """A curve from NAME, or NAME:FIELD=VALUE,…, a field's value being one or several between bars.

    multi_bd  single_bd:L=32  multi_bd:open_at=0.5,accept=0.7|0.9  fixed:select.k=1|2|4
    One field may have several values; where none has, `accept` has the thresholds.
    Raises PolicyError  for an unknown policy or field, or a value that is not allowed
    """
    name, _, rest = text.partition(":")
    policy, swept, values = named(name), "accept", list(thresholds)
    for part in filter(None, rest.split(",")):
        field, equals, said = part.partition("=")
        if not equals:
            raise PolicyError(f"{part!r} of {text!r} is not FIELD=VALUE; use multi_bd:open_at=0.5, say")
        found = [_value(text, one) for one in said.split("|")]
        if len(found) > 1:
            swept, values = field, found
        policy = _with(policy, field, found[0])
    return Line(text, swept, {value: _with(policy, swept, value) for value in values})


def measure(
    one: Line,
    build: Callable[[Policy], AbstractContextManager[Decoder]],
    tasks: Sequence[str],
    n: int,
    told: Callable[[str], None] = lambda text: None,
) -> dict[float, Record]:
    """Decode n prompts a task for each value of a line; `build` makes an LLM of a policy. `told` hears each point."""
    records: dict[float, Record] = {}
    if one.swept == "accept":  # a column: one LLM does
        with build(next(iter(one.policies.values()))) as llm:
            for value in one.policies:
                (records[value],) = evaluate(llm, tasks, n, (value,))
                told(_said(one, value, records[value]))
        return records
    for value, policy in one.policies.items():
        with build(policy) as llm:
            (records[value],) = evaluate(llm, tasks, n, (policy.accept,))
        told(_said(one, value, records[value]))
    return records


def aup(points: Iterable[tuple[float, float]], best: float) -> float:
    """Accuracy under parallelism of (tokens per forward, accuracy in percent).

        ρ₁·y₁ + Σ (ρᵢ − ρᵢ₋₁) · (w(yᵢ)·yᵢ + w(yᵢ₋₁)·yᵢ₋₁) / 2,   w(y) = min(exp(−3 · (1 − y / best)), 1)

    over the points by rising ρ whose y is at least y₁ − 5
    best    highest accuracy of all methods that are compared
    Source  d3LLM (hao-ai-lab); there a point below y₁ − 5 at the end of the curve is an error, here it is left out
    """
    ordered = sorted(points)
    kept = [(rho, y) for rho, y in ordered if y >= ordered[0][1] - DROP]
    area = kept[0][0] * kept[0][1]
    for (r0, y0), (r1, y1) in pairwise(kept):
        area += (r1 - r0) * sum(y * min(math.exp(-STEEP * (1 - y / best)), 1.0) for y in (y0, y1)) / 2
    return area


def described(one: Line, records: dict[float, Record], made: Json) -> Json:
    """JSON-able: the line's first policy, what was swept, and its points with what made them."""
    points = [{"value": value, "made": dict(made), **record.describe()} for value, record in records.items()]
    policy = next(iter(one.policies.values())).describe()
    return {"policy": policy, "swept": one.swept, "points": points}


def joined(old: Json | None, new: Json) -> Json:
    """A described line with the points of an older one of the same name that it has not."""
    if old is None:
        return new
    fresh = {point["value"] for point in new["points"]}
    points = [point for point in old["points"] if point["value"] not in fresh] + new["points"]
    return {**new, "points": sorted(points, key=lambda point: point["value"])}


def report(lines: dict[str, Json], **how: object) -> Json:
    """The JSON-able record of a frontier; each line gets its AUP over all prompts, and the mean of the tasks' own.

    Best accuracies are of the lines in this record, so that an AUP may change when a line is added.
    """
    tasks = next(iter(lines.values()))["points"][0]["tasks"]
    whole = _aups({name: [_xy(p) for p in one["points"]] for name, one in lines.items()})
    each = [_aups({name: [_xy(p["tasks"][t]) for p in one["points"]] for name, one in lines.items()}) for t in tasks]
    out: Json = {}
    for name, one in lines.items():
        mean = sum(task[name] for task in each) / len(each)
        out[name] = {**one, "aup": round(whole[name], 2), "task_mean_aup": round(mean, 2)}
    return {"schema": SCHEMA, "kind": "frontier", **how, "lines": out}


def markdown(record: Json) -> str:
    """The table of a record: accuracy and tokens per forward of each point, and AUP."""
    head = "| policy | swept | accuracy at tokens per forward | AUP | mean AUP of a task |\n"
    head += "| --- | --- | --- | ---: | ---: |\n"
    rows = []
    for name, one in sorted(record["lines"].items(), key=lambda item: -item[1]["aup"]):
        points = sorted(one["points"], key=lambda p: p["tokens_per_forward"])
        said = ", ".join(f"{p['accuracy']:.3f} at {p['tokens_per_forward']:.2f} ({p['value']:g})" for p in points)
        shown = name.replace("|", "\\|")
        rows.append(f"| `{shown}` | `{one['swept']}` | {said} | {one['aup']:.0f} | {one['task_mean_aup']:.0f} |\n")
    return head + "".join(rows)


def draw(record: Json, path: Path) -> None:
    """Write the plot of a record as PNG. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("the plot needs matplotlib; pip install 'dlx[plot]', or leave --png out") from None
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="tokens per forward", ylabel="accuracy")
    for i, (name, one) in enumerate(record["lines"].items()):
        points = [_xy(point) for point in one["points"]]  # by what was swept
        label = f"{name} (AUP {one['aup']:.0f})"
        style = ("-", "--", ":", "-.")[i // 10 % 4]
        axes.plot([x for x, _ in points], [y / 100 for _, y in points], marker="o", linestyle=style, label=label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path)


def _aups(lines: dict[str, list[tuple[float, float]]]) -> dict[str, float]:
    best = max(y for points in lines.values() for _, y in points)
    return {name: aup(points, max(best, 1e-9)) for name, points in lines.items()}


def _xy(point: Json) -> tuple[float, float]:
    return point["tokens_per_forward"], 100 * point["accuracy"]


def _said(one: Line, value: float, record: Record) -> str:
    total = record.total
    return f"{one.name}  {one.swept}={value:g}  {total.accuracy:.4f} at {total.tokens_per_forward:.3f}"


def _value(text: str, said: str) -> Any:
    try:
        return ast.literal_eval(said)
    except (ValueError, SyntaxError):
        raise PolicyError(f"{said!r} of {text!r} is not a value; use a number, True, False or None") from None


def _with(policy: Policy, field: str, value: Any) -> Policy:
    """The policy with that field, or that field of a rule."""
    outer, _, inner = field.partition(".")
    try:
        if inner:
            value = replace(vars(policy)[outer], **{inner: value})
        return replace(policy, **{outer: value})
    except (TypeError, KeyError):
        raise PolicyError(f"{field!r} is not a field of this policy or of its rules: {policy}") from None
