"""The evaluation counts what an LLM returns; the LLM here is a list of prepared answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from dlx.errors import ConfigError
from dlx.evals import Record, Score, evaluate, prompts, report, table
from dlx.graphs.policies import POLICIES
from dlx.provenance import place, provenance
from dlx.request import Finish, Output, SamplingParams, Timings
from dlx.tasks import held

TASKS = ("add2", "chain3")


class Answers:
    """Answers every sample; at thresholds under 0.6, the first of each task wrongly."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.samples = prompts(TASKS, n)
        self.asked: list[tuple[list[str], SamplingParams]] = []

    def generate(
        self, prompts: Sequence[list[Mapping[str, str]]], params: SamplingParams, progress: bool = False
    ) -> list[Output]:
        self.asked.append(([chat[0]["content"] for chat in prompts], params))
        assert params.threshold is not None
        wrong = params.threshold < 0.6
        return [self.output(i, "0" if wrong and i % self.n == 0 else one.answer) for i, one in enumerate(self.samples)]

    def output(self, i: int, text: str) -> Output:
        """`add2` takes 4 tokens in 2 forwards, `chain3` 24 in 3; each has one prefill forward."""
        tokens, nfe = (4, 2) if i < self.n else (24, 3)
        return Output(i, [1], text, [5] * (tokens - 1), Finish.STOP, tokens, nfe, 1, Timings(0.0, 0.0, 0.0))


def test_every_threshold_is_scored_by_task() -> None:
    low, high = evaluate(Answers(4), TASKS, n=4, thresholds=(0.5, 0.9))
    assert (low.threshold, high.threshold) == (0.5, 0.9)
    assert low.tasks == {"add2": Score(4, 3, 16, 8, 4), "chain3": Score(4, 3, 96, 12, 4)}
    assert high.tasks["add2"].accuracy == 1.0
    assert low.total == Score(8, 6, 112, 20, 8)
    assert low.total.accuracy == 0.75


def test_tokens_per_forward_is_the_sum_of_tokens_over_the_sum_of_forwards() -> None:
    (record,) = evaluate(Answers(4), TASKS, n=4, thresholds=(0.9,))
    assert record.tasks["add2"].tokens_per_forward == 2.0
    assert record.tasks["chain3"].tokens_per_forward == 8.0
    assert record.total.tokens_per_forward == 112 / 20
    described = record.describe()
    assert described["tokens_per_forward"] == described["trainer_tokens_per_forward"] == 5.6
    assert described["task_mean_tokens_per_forward"] == 5.0


def test_prompts_are_asked_as_chats_with_the_threshold_and_the_trainers_length() -> None:
    llm = Answers(2)
    evaluate(llm, TASKS, n=2, thresholds=(0.7,))
    ((texts, params),) = llm.asked
    assert texts == [one.prompt for one in llm.samples]
    assert params == SamplingParams(max_tokens=224, threshold=0.7)


def test_prompts_are_held_out_and_the_same_for_the_same_seed() -> None:
    asked = prompts(TASKS, 5)
    assert [one.task for one in asked] == ["add2"] * 5 + ["chain3"] * 5
    assert all(held(one.task, one.prompt) for one in asked)
    assert asked == prompts(TASKS, 5)
    assert asked != prompts(TASKS, 5, seed=8)


@pytest.mark.parametrize(("tasks", "n"), [(TASKS, 0), ((), 5)])
def test_an_evaluation_of_nothing_is_refused(tasks: tuple[str, ...], n: int) -> None:
    with pytest.raises(ConfigError, match="leave nothing to evaluate"):
        evaluate(Answers(1), tasks, n=n)


def test_a_report_holds_the_whole_policy_its_origin_and_every_threshold() -> None:
    records = evaluate(Answers(4), TASKS, n=4, thresholds=(0.5, 0.9))
    source = provenance("python tools/eval.py", "cpu")
    policy = POLICIES["multi_bd"]
    value = json.loads(json.dumps(report(records, model="tiny", policy=policy, made=source, n=4)))
    assert value["policy"] == policy.describe()
    assert set(value["made"]) == {"commit", "torch", "triton", "date", "command", "machine"}
    assert value["n"] == 4
    assert list(value["thresholds"]) == ["0.5", "0.9"]
    assert value["thresholds"]["0.5"]["tasks"]["add2"] == {
        "accuracy": 0.75,
        "tokens_per_forward": 2.0,
        "prompts": 4,
        "correct": 3,
        "tokens": 16,
        "nfe": 8,
        "prefill_forwards": 4,
    }


@pytest.mark.parametrize(
    ("machine", "folder"), [("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"), ("cpu, x86_64", "cpu")]
)
def test_a_report_is_placed_by_machine_model_and_policy(machine: str, folder: str) -> None:
    path = place(Path("runs"), "tiny", "single_bd", {"machine": machine})
    assert path == Path("runs") / folder / "tiny--single_bd.json"


def test_the_table_has_a_row_a_task_and_a_column_a_threshold() -> None:
    record = Record(0.9, {"add2": Score(4, 3, 16, 8, 4)})
    lines = [line.split() for line in table([record, record]).splitlines()]
    assert lines[0] == ["task", "0.9", "0.9"]
    assert lines[1] == ["add2", "0.750", "2.00", "0.750", "2.00"]
    assert lines[-1] == ["prefills", "4", "4"]
