"""Tasks of dlx's own, for lm-eval: those of the bundled model, and GSM8K and HumanEval read from local files.

Imports lm-eval: import this module only to evaluate.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from dlx.errors import ConfigError
from dlx.evals import MAX_TOKENS, prompts
from dlx.harness.program import passes
from dlx.tasks import check

Doc = dict[str, Any]  # Any, as files hold what they hold

PROMPTS = 100  # of a bundled task, where nothing is said
FILES = {"gsm8k": ("question", "answer"), "humaneval": ("task_id", "prompt", "entry_point", "test")}  # keys of a line
UNTIL = {
    "gsm8k": ["\nQuestion:", "\n\nQuestion:"],
    "humaneval": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],  # as the paper of Codex ends a completion
}
REASON = "\n\nReason step by step, and end with a line '#### ' and the number."
WRITE = "Complete this Python function. Answer with the whole function in one code block.\n\n```python\n{}\n```"
BOX = re.compile(r"\\boxed\{([^{}]*)\}")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def bundled(names: Sequence[str], n: int | None) -> dict[str, ConfigurableTask]:
    """Tasks of `dlx.tasks`, n held-out prompts each: the very prompts of `dlx.evals.evaluate` for the same names and n.

    Raises ConfigError  if a task is unknown or lacks its package
    """
    drawn = prompts(names, PROMPTS if n is None else n)
    made = {}
    for name in names:
        samples = [one for one in drawn if one.task == name]
        docs = [{"at": at, "prompt": one.prompt, "answer": one.answer} for at, one in enumerate(samples)]

        def checked(doc: Doc, text: str, samples: Sequence[Any] = samples) -> bool:
            return check(samples[doc["at"]], text)

        made[f"tiny_{name}"] = task(f"tiny_{name}", docs, "prompt", "answer", checked, [], MAX_TOKENS)
    return made


def from_file(name: str, path: Path, chat: bool) -> ConfigurableTask:
    """gsm8k or humaneval, from the file as it is published: JSON lines, or those in gzip.

    chat  ask as one asks an assistant; else the bare text is to be continued
    Raises ConfigError  if the file cannot be read or is another one
    """
    docs = lines(path, FILES[name])
    if name == "gsm8k":
        for at, doc in enumerate(docs):
            if "####" not in doc["answer"]:
                raise ConfigError(f"{path}:{at + 1} has an answer without '####'; take GSM8K's file as it is published")
        text = "{{question}}" + REASON if chat else "Question: {{question}}\nAnswer:"
        return task(name, docs, text, "answer", same_number, UNTIL[name] if not chat else [], 512)
    return task(
        name,
        docs,
        (lambda doc: WRITE.format(doc["prompt"].rstrip())) if chat else "{{prompt}}",
        lambda doc: f"{doc['test']}\ncheck({doc['entry_point']})",
        runs,
        UNTIL[name] if not chat else [],
        512,
        unsafe=True,
    )


def task(
    name: str,
    docs: Sequence[Doc],
    text: str | Callable[[Doc], str],
    target: str | Callable[[Doc], str],
    right: Callable[[Doc, str], bool],
    until: Sequence[str],
    tokens: int,
    unsafe: bool = False,
) -> ConfigurableTask:
    """A task of documents in memory, whose accuracy is the mean of `right`(document, answer)."""
    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: {"test": Dataset.from_list(list(docs))},
            "test_split": "test",
            "doc_to_text": text,
            "doc_to_target": target,
            "process_results": lambda doc, texts: {"accuracy": float(right(doc, texts[0]))},
            "metric_list": [{"metric": "accuracy", "aggregation": "mean", "higher_is_better": True}],
            "output_type": "generate_until",
            "generation_kwargs": {"until": list(until), "max_gen_toks": tokens, "do_sample": False},
            "num_fewshot": 0,
            "unsafe_code": unsafe,
        }
    )


def lines(path: Path, keys: Sequence[str]) -> list[Doc]:
    """The JSON objects of a file, one a line, of each the text under `keys`."""
    try:
        raw = path.expanduser().read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
        docs = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, EOFError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON lines ({error}); take the file as it is published") from error
    for at, doc in enumerate(docs):
        missing = [key for key in keys if not isinstance(doc, Mapping) or not isinstance(doc.get(key), str)]
        if missing:
            raise ConfigError(f"{path}, object {at + 1}, has no text {missing[0]!r}; expected {', '.join(keys)}")
    if not docs:
        raise ConfigError(f"{path} is empty; take the file as it is published")
    return [{key: doc[key] for key in keys} for doc in docs]


def same_number(doc: Doc, text: str) -> bool:
    """Whether an answer's number is GSM8K's: what stands behind its last '####', or in its last box, or last at all."""
    return number(text) is not None and number(text) == number(doc["answer"])


def number(text: str) -> float | None:
    """The number that an answer ends with, commas removed; None if there is none."""
    said = text.rsplit("####", 1)[1] if "####" in text else (BOX.findall(text) or [text])[-1]
    found = NUMBER.findall(said)
    if not found:
        return None
    return float((found[0] if "####" in text else found[-1]).replace(",", ""))


def runs(doc: Doc, text: str) -> bool:
    """Whether the program of an answer passes HumanEval's test; see `program.passes` for how it is run."""
    return passes(program(doc, text))


def program(doc: Doc, text: str) -> str:
    """The prompt with the answer behind it; or the function of the answer, behind what the prompt begins with."""
    fenced = FENCE.findall(text)
    code = fenced[0] if fenced else text
    whole = re.search(rf"^def {re.escape(doc['entry_point'])}\b", code, re.MULTILINE)
    head = doc["prompt"].split(f"def {doc['entry_point']}")[0] + "\n" if whole else doc["prompt"]
    return f"{head}{code}\n\n{doc['test']}\ncheck({doc['entry_point']})\n"
