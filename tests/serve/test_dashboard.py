"""docs/grafana.json asks for what the server tells."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dlx.request import Finish, Output, Timings
from dlx.serve.metrics import Metrics
from tests.serve.fake import FakeEngine

FILE = Path(__file__).parents[2] / "docs" / "grafana.json"
GIVEN = {"instance", "job"}  # labels that Prometheus adds


class Exported(NamedTuple):
    samples: set[str]
    labels: set[str]


@pytest.fixture(scope="module")
def exported() -> Exported:
    """Names of the samples and labels of a server that has answered once."""
    engine: Any = FakeEngine()
    engine.status = "ready"
    metrics = Metrics(engine)
    output = Output(0, [1], "x", [1], Finish.STOP, 2, 1, 1, Timings(0.1, 0.2, 0.3))
    metrics.ended("finished", "eos", output, 2)
    families = text_string_to_metric_families(metrics.text().decode())
    samples = [sample for family in families for sample in family.samples]
    return Exported({s.name for s in samples}, {label for s in samples for label in s.labels})


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads(FILE.read_text())


def expressions(dashboard: dict[str, Any]) -> list[str]:
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    return asked + [v["definition"] for v in dashboard["templating"]["list"] if "definition" in v]


def test_every_metric_it_asks_for_is_exported(dashboard: dict[str, Any], exported: Exported) -> None:
    asked = {name for text in expressions(dashboard) for name in re.findall(r"\bdlx_\w+", text)}
    assert len(asked) > 15
    assert asked <= exported.samples


def test_every_label_it_names_is_there(dashboard: dict[str, Any], exported: Exported) -> None:
    named: set[str] = set()
    for text in expressions(dashboard):
        named |= {label.strip() for group in re.findall(r"by \(([^)]*)\)", text) for label in group.split(",")}
        named |= {label for group in re.findall(r"\{([^}]*)\}", text) for label in re.findall(r"(\w+)\s*[=!]", group)}
    legends = [t["legendFormat"] for panel in dashboard["panels"] for t in panel.get("targets", ())]
    named |= {label for legend in legends for label in re.findall(r"\{\{(\w+)\}\}", legend)}
    assert {"instance", "le", "outcome"} <= named
    assert named <= exported.labels | GIVEN


def test_everything_that_is_exported_is_drawn(dashboard: dict[str, Any], exported: Exported) -> None:
    asked = " ".join(expressions(dashboard))
    parts = ("_bucket", "_sum", "_count", "_created")  # of a histogram one is enough
    names = {re.sub("|".join(f"{part}$" for part in parts), "", name) for name in exported.samples}
    assert not [name for name in names if name not in asked]


def test_no_two_panels_overlap_or_share_a_number(dashboard: dict[str, Any]) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken
        taken |= cells
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
