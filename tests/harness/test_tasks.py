"""GSM8K and HumanEval from local files, with invented problems in the published formats, and what answers count."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from dlx.errors import ConfigError
from dlx.harness.model import Harness
from dlx.harness.options import options
from dlx.harness.run import check, figures, run, samples
from dlx.harness.tasks import bundled, from_file, number, program
from dlx.tasks import held
from tests.harness.answers import Answers

SUMS = [
    {"question": "Ada has 3 pens and buys 4. How many has she?", "answer": "3 + 4 = <<3+4=7>>7 pens.\n#### 7"},
    {"question": "A hall has 1,000 seats and 20 are taken. How many are free?", "answer": "1000 - 20\n#### 980"},
]
CODE = [
    {
        "task_id": "Invented/0",
        "prompt": 'from typing import List\n\n\ndef double(xs: List[int]) -> List[int]:\n    """Twice each."""\n',
        "entry_point": "double",
        "canonical_solution": "    return [2 * x for x in xs]\n",
        "test": "def check(candidate):\n    assert candidate([1, 2]) == [2, 4]\n",
    },
    {
        "task_id": "Invented/1",
        "prompt": 'def first(xs):\n    """The first, or None."""\n',
        "entry_point": "first",
        "canonical_solution": "    return xs[0] if xs else None\n",
        "test": "def check(candidate):\n    assert candidate([]) is None\n    assert candidate([3]) == 3\n",
    },
]


def written(path: Path, docs: list[dict[str, Any]]) -> Path:
    text = "\n".join(map(json.dumps, docs)) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def evaluated(name: str, path: Path, llm: Answers, chat: bool = False) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The figures of a task and its records."""
    model = Harness(llm)  # type: ignore[arg-type]
    given = options(tasks=(name,), data={name: path}, confirm_run_unsafe_code=True)
    found = run(model, {name: from_file(name, path, chat)}, given, chat)
    return figures(model, found["results"])["tasks"][name], list(samples(model.answers, found["samples"]))


def test_gsm8k_counts_the_number_behind_the_marks(tmp_path: Path) -> None:
    llm = Answers(lambda text: "So it is\n#### 7\nQuestion: and 9?" if "Ada" in text else "#### 98")
    figures, records = evaluated("gsm8k", written(tmp_path / "test.jsonl", SUMS), llm)
    assert (figures["accuracy"], figures["prompts"], figures["nfe_per_sample"]) == (0.5, 2, 2.0)
    assert figures["tokens_per_forward"] == 3.0
    assert [(one["text"], one["accuracy"], one["nfe"]) for one in records] == [
        ("So it is\n#### 7", 1.0, 2),
        ("#### 98", 0.0, 2),
    ]
    assert records[0]["prompt"] == f"Question: {SUMS[0]['question']}\nAnswer:"


def test_gsm8k_is_asked_as_an_assistant_is(tmp_path: Path) -> None:
    llm = Answers(lambda text: "7")
    _, records = evaluated("gsm8k", written(tmp_path / "test.jsonl", SUMS), llm, chat=True)
    assert records[0]["prompt"].startswith(f"<|im_start|>user\n{SUMS[0]['question']}\n\nReason")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("#### 1,234", 1234.0),
        ("one #### 5\n#### -6 apples, or 7", -6.0),
        (r"it is \boxed{12}. Or 13?", 12.0),
        ("3 and then 4.50.", 4.5),
        ("nothing", None),
        ("####", None),
    ],
)
def test_the_number_of_an_answer(text: str, value: float | None) -> None:
    assert number(text) == value


def test_humaneval_runs_what_is_written(tmp_path: Path) -> None:
    def say(text: str) -> str:
        return CODE[0]["canonical_solution"] + "\n\ndef other(): pass" if "double" in text else "    return 3\n"

    figures, records = evaluated("humaneval", written(tmp_path / "HumanEval.jsonl.gz", CODE), Answers(say))
    assert figures["accuracy"] == 0.5
    assert [one["accuracy"] for one in records] == [1.0, 0.0]
    assert records[0]["text"].rstrip() == CODE[0]["canonical_solution"].rstrip()


def test_humaneval_takes_the_function_of_an_assistants_answer(tmp_path: Path) -> None:
    def say(text: str) -> str:
        name = "double" if "double" in text else "first"
        body = "return [2 * x for x in xs]" if name == "double" else "return xs[0] if xs else None"
        return f"Here it is:\n```python\ndef {name}(xs):\n    {body}\n```\nIt is short."

    figures, records = evaluated("humaneval", written(tmp_path / "h.jsonl", CODE), Answers(say), chat=True)
    assert figures["accuracy"] == 1.0
    assert "Complete this Python function" in records[0]["prompt"]


def test_a_program_is_the_prompt_with_the_answer_or_the_answers_own_function() -> None:
    doc = {name: CODE[0][name] for name in ("prompt", "entry_point", "test")}
    tail = f"\n\n{doc['test']}\ncheck(double)\n"
    assert program(doc, "    return xs") == f"{doc['prompt']}    return xs{tail}"
    whole = "def double(xs: List[int]):\n    return xs\n"
    assert program(doc, f"```py\n{whole}```") == f"from typing import List\n\n\n\n{whole}{tail}"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("gsm8k", '{"question": "a"}', "object 1, has no text 'answer'"),
        ("gsm8k", '{"question": "a", "answer": "7"}', "'####'"),
        ("gsm8k", "", "is empty"),
        ("gsm8k", "{", "cannot be read as JSON lines"),
        ("humaneval", '["a"]', "has no text 'task_id'"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, name: str, text: str, said: str) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        from_file(name, path, chat=False)


def test_bundled_tasks_have_held_out_prompts() -> None:
    tasks = bundled(["add2", "chain3"], 5)
    assert list(tasks) == ["tiny_add2", "tiny_chain3"]
    for name, task in tasks.items():
        prompts = [doc["prompt"] for doc in task.eval_docs]
        assert len(prompts) == 5
        assert all(held(name.removeprefix("tiny_"), prompt) for prompt in prompts)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tasks": ("gsm8k",)}, "--data gsm8k=FILE"),
        ({"tasks": ("tiny",), "data": {"gsm8k": "a"}}, "data names 'gsm8k', which is not asked for"),
        ({"tasks": ("humaneval",), "data": {"humaneval": "a"}}, "--confirm-run-unsafe-code"),
        ({"tasks": ("tiny_poetry",)}, "'tiny_poetry' is unknown"),
        ({"save_results": True}, "save_results=True needs a folder"),
        ({"include_path": "/nowhere"}, "include_path='/nowhere' is not a folder"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_a_model_is_loaded(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check(options(**given))


@pytest.mark.parametrize(
    ("given", "said"), [({"limit": 0}, "limit=0"), ({"tasks": ()}, "tasks="), ({"shots": 1}, "use tasks, limit")]
)
def test_options_are_checked(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        options(**given)
