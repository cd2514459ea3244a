"""An evaluation from a run file to its files, with the nano model, and that it is the trainer's evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dlx import LLM
from dlx.cli import main
from dlx.errors import ConfigError
from dlx.evals import evaluate
from dlx.harness.options import options
from dlx.harness.run import evaluation, table
from tests.harness.test_files import LINE_6

CPU = {"graphs": "off", "device": "cpu", "dtype": "float32"}
TASK_FILE = """
task: mine
custom_dataset: !function docs.docs
test_split: test
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
output_type: generate_until
generation_kwargs: {until: ["!"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list:
  - {name: first, filter: [{function: take_first}]}
  - {name: digit, filter: [{function: regex, regex_pattern: "(\\\\d)"}, {function: take_first}]}
"""
DOCS = """
from datasets import Dataset

def docs(**_):
    return {"test": Dataset.from_list([{"prompt": "50 + 53 =", "answer": "103"}] * 3)}
"""


@pytest.fixture(scope="module")
def results(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Line 6 of issue 8: a run file with the field's keys, through the command line; its folder."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "run.yaml").write_text(LINE_6.format(model=nano, out=folder / "out", include=folder))
    assert main(["eval", "--config", str(folder / "run.yaml"), "--device", "cpu", "--limit", "6"]) == 0
    return json.loads((folder / "out" / "results.json").read_text()), folder / "out"


def test_a_run_file_of_the_field_runs_and_flags_go_before_it(results: tuple[dict[str, Any], Path]) -> None:
    found, _ = results
    assert found["tasks"]["tiny_add2"]["prompts"] == 6
    assert (found["policy"]["N"], found["policy"]["L"]) == (2, 16)
    assert found["options"]["params"] == {"temperature": 0.0, "max_tokens": 32, "max_nfe": 64}


def test_every_answer_is_written_with_what_it_cost(results: tuple[dict[str, Any], Path]) -> None:
    found, folder = results
    records = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    total = found["total"]
    assert len(records) == 6
    assert sum(one["nfe"] for one in records) == total["nfe"] == 6 * total["nfe_per_sample"]
    assert sum(one["tokens"] for one in records) == total["tokens"]
    assert sum(one["accuracy"] for one in records) == pytest.approx(6 * total["accuracy"])
    assert total["tokens_per_s"] == pytest.approx(total["tokens"] / total["seconds"])


def test_the_bundled_tasks_count_as_the_trainers_evaluation_does(nano: Path, nano_llm: LLM) -> None:
    names = ("add2", "chain3")
    (record,) = evaluate(nano_llm, names, n=8, thresholds=(0.9,))
    given = options(
        tasks=tuple(f"tiny_{name}" for name in names), limit=8, llm={"model": nano, **CPU}, params={"threshold": 0.9}
    )
    found = evaluation(given)
    for name, score in record.tasks.items():
        mine = found["tasks"][f"tiny_{name}"]
        assert (mine["accuracy"], mine["tokens"], mine["nfe"]) == (score.accuracy, score.tokens, score.nfe)
    assert found["total"]["accuracy"] == record.total.accuracy


def test_the_recorded_evaluation_is_the_trainers_within_sampling_error() -> None:
    runs = Path(__file__).parents[2] / "profiles" / "runs" / "cpu"
    mine = json.loads((runs / "tiny--eval.json").read_text())["total"]
    trainers = json.loads((runs / "tiny--single_bd.json").read_text())["thresholds"]["0.9"]
    assert mine["prompts"] == trainers["prompts"] == 1100
    assert abs(mine["accuracy"] - trainers["accuracy"]) < 2 * mine["stderr"] < 0.01
    assert mine["tokens_per_forward"] == pytest.approx(trainers["tokens_per_forward"], rel=0.01)


def test_task_files_of_a_folder_run(nano: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(TASK_FILE)
    (tmp_path / "docs.py").write_text(DOCS)
    out = {"out": tmp_path / "out", "save_results": True}
    found = evaluation(options(tasks=("mine",), chat=True, include_path=tmp_path, llm={"model": nano, **CPU}, **out))
    assert (found["tasks"]["mine"]["exact_match,first"], found["tasks"]["mine"]["exact_match,digit"]) == (1.0, 0.0)
    records = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [(one["exact_match,first"], one["exact_match,digit"]) for one in records] == [(1.0, 0.0)] * 3
    assert "accuracy" not in found["total"]
    assert "see results" in table(found)


@pytest.mark.slow  # lm-eval reads the names of all its tasks
def test_an_unknown_task_is_refused(nano: Path) -> None:
    with pytest.raises(ConfigError, match="task 'gsm8k_of_mine' is unknown; use tiny"):
        evaluation(options(tasks=("gsm8k_of_mine",), llm={"model": nano, **CPU}))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"family": ("dream",)}, "model_name says dream, and the checkpoint is sdar"),
        ({"mask_id": 9}, "mask_token_id=9 is not the mask id"),
    ],
)
def test_another_checkpoint_than_the_run_file_says_is_refused(nano: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        evaluation(options(tasks=("tiny_add2",), limit=1, llm={"model": nano, **CPU}, **given))


def test_without_lm_eval_the_command_that_brings_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlx.harness.run.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"run pip install 'dlx\[eval\]'"):
        evaluation(options())


def test_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(ConfigError, match="params has 'beams', which SamplingParams has not; use max_tokens,"):
        evaluation(options(params={"beams": 4}))


def test_a_folder_that_cannot_be_written_is_told_before_anything_runs(nano: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        evaluation(options(tasks=("tiny_add2",), limit=1, out=tmp_path / "file" / "out", llm={"model": nano, **CPU}))


def test_the_table_shows_figures_of_tasks_and_of_all() -> None:
    spent = {"prompts": 4, "accuracy": 0.75, "stderr": 0.25, "tokens_per_forward": 3.0, "nfe_per_sample": 2.5}
    total = {**spent, "tokens": 30, "seconds": 2.0, "tokens_per_s": 15.0}
    lines = table({"tasks": {"tiny_add2": spent}, "total": total}).splitlines()
    assert lines[1].split() == ["tiny_add2", "4", "0.750", "±", "0.250", "3.00", "2.5"]
    assert lines[-1] == "30 tokens in 2.0 s: 15.0 tokens/s"


def test_data_without_a_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--tasks", "gsm8k", "--data", "gsm8k"]) == 2
    assert "'gsm8k' is not allowed; write NAME=VALUE" in capsys.readouterr().err
