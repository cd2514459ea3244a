"""The frontier measures what it is told, and its area is the field's."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from dlx.errors import ConfigError, PolicyError
from dlx.evals import prompts
from dlx.frontier import aup, described, joined, line, markdown, measure, report
from dlx.graphs.policies import POLICIES, Policy
from dlx.graphs.rules import Fixed
from dlx.request import Finish, Output, SamplingParams, Timings
from tools import frontier

TASKS = ("add2", "chain3")


class Answers:
    """Answers right with `threshold` · 10 forwards for 20 tokens, and the first sample wrongly below 0.6."""

    def __init__(self, n: int, policy: Policy) -> None:
        self.samples = prompts(TASKS, n)
        self.policy = policy

    def generate(
        self, prompts: Sequence[list[Mapping[str, str]]], params: SamplingParams, progress: bool = False
    ) -> list[Output]:
        assert params.threshold is not None
        nfe = self.policy.select.k if isinstance(self.policy.select, Fixed) else round(10 * params.threshold)
        texts = [one.answer for one in self.samples]
        texts[0] = "?" if params.threshold < 0.6 else texts[0]
        some = Timings(0.0, 0.0, 0.0)
        return [Output(i, [1], text, [5] * 19, Finish.STOP, 20, nfe, 1, some) for i, text in enumerate(texts)]


def measured(text: str, n: int = 2, thresholds: Sequence[float] = (0.5, 1.0)) -> tuple[dict, list[Policy]]:
    built: list[Policy] = []

    @contextmanager
    def build(policy: Policy) -> Iterator[Answers]:
        built.append(policy)
        yield Answers(n, policy)

    one = line(text, thresholds)
    return described(one, measure(one, build, TASKS, n), {"commit": "0"}), built


def test_a_line_is_a_policy_with_fields_of_it_and_of_its_rules() -> None:
    assert line("single_bd", (0.5, 0.9)).policies == {
        0.5: Policy(accept=0.5),
        0.9: Policy(accept=0.9),
    }
    one = line("multi_bd:N=2,open_at=0.5,accept=0.7|0.8")
    assert (one.swept, list(one.policies)) == ("accept", [0.7, 0.8])
    assert one.policies[0.8] == Policy(N=2, open_at=0.5, accept=0.8)
    one = line("fixed:select.k=1|4")
    assert one.swept == "select.k"
    assert one.policies[4].select == Fixed(4) and POLICIES["fixed"].select == Fixed(1)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("fast", "'fast' is unknown"),
        ("multi_bd:K=3", "'K' is not a field"),
        ("fixed:select.n=3", r"'select\.n' is not a field"),
        ("multi_bd:N", "'N' of 'multi_bd:N' is not FIELD=VALUE"),
        ("multi_bd:N=many", "'many' of 'multi_bd:N=many' is not a value"),
        ("multi_bd:accept=2", "accept=2 is not allowed"),
    ],
)
def test_a_line_that_cannot_be_is_refused(text: str, told: str) -> None:
    with pytest.raises(PolicyError, match=told):
        line(text)


def test_one_engine_serves_a_sweep_of_thresholds_and_one_a_value_any_other() -> None:
    one, built = measured("single_bd")
    assert len(built) == 1
    assert [(p["value"], p["accuracy"], p["tokens_per_forward"]) for p in one["points"]] == [
        (0.5, 0.75, 4.0),
        (1.0, 1.0, 2.0),
    ]
    one, built = measured("fixed:select.k=2|4")
    assert [policy.select for policy in built] == [Fixed(2), Fixed(4)]
    assert [p["tokens_per_forward"] for p in one["points"]] == [10.0, 5.0]


def test_the_area_is_the_rectangle_of_the_first_point_and_weighted_trapezoids() -> None:
    assert aup([(2.0, 90.0)], 90.0) == 180.0
    w = math.exp(-3 * (1 - 87 / 90))
    assert aup([(5.0, 87.0), (2.0, 90.0)], 90.0) == pytest.approx(180 + 3 * (90 + 87 * w) / 2)
    lost = [(2.0, 90.0), (9.0, 84.9)]  # more than 5 below the first: does not count
    assert aup(lost, 90.0) == 180.0
    better = aup([(2.0, 90.0), (4.0, 90.0)], 95.0)  # another method is better: the trapezoid weighs less
    assert better == pytest.approx(180 + 2 * 90 * math.exp(-3 * (1 - 90 / 95)))


def test_a_record_has_the_area_of_each_line_and_the_mean_of_the_tasks() -> None:
    one, _ = measured("single_bd")
    other, _ = measured("fixed:select.k=2|4")
    record = report({"a": one, "b": other}, model="tiny")
    assert record["lines"]["b"]["aup"] == pytest.approx(5.0 * 100 + 5 * 100)
    assert record["lines"]["a"]["aup"] == 200.0  # 75 % at 4 does not count
    assert record["lines"]["a"]["task_mean_aup"] == pytest.approx((200 + 400) / 2)  # the other task lost nothing
    rows = markdown(record).splitlines()
    assert rows[2].startswith("| `b` | `select.k` | 1.000 at 5.00 (4), 1.000 at 10.00 (2) | 1000 |")
    json.dumps(record)


def test_points_join_those_of_the_same_line() -> None:
    old, _ = measured("single_bd", thresholds=(0.5, 0.9))
    new, _ = measured("single_bd", thresholds=(0.9, 0.7))
    both = joined(old, new)
    assert [p["value"] for p in both["points"]] == [0.5, 0.7, 0.9]
    assert joined(None, new) == new


def test_the_tool_writes_a_record_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    record, plot = tmp_path / "runs" / "f.json", tmp_path / "f.png"
    flags = ["--n", "1", "--tasks", "add2", "--model", "tests/data/nano", "--device", "cpu", "--json", str(record)]
    assert frontier.main(["single_bd", "--thresholds", "0.9", *flags]) == 0
    assert frontier.main(["fixed:select.k=2|8", *flags, "--png", str(plot)]) == 0
    value = json.loads(record.read_text())
    assert list(value["lines"]) == ["single_bd", "fixed:select.k=2|8"]
    assert value["lines"]["single_bd"]["policy"]["select"]["rule"] == "Threshold"
    assert plot.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "single_bd  accept=0.9" in out and r"`fixed:select.k=2\|8`" in out
    plot.unlink()
    assert frontier.main(["--only-draw", "--json", str(record), "--png", str(plot)]) == 0
    assert plot.exists() and json.loads(record.read_text()) == value
    with pytest.raises(ConfigError, match="other prompts"):
        frontier.main(["single_bd", *flags, "--n", "2"])
