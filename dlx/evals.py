"""Quality and parallelism of a model over held-out prompts of the bundled tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, NamedTuple, Protocol

from dlx.errors import ConfigError
from dlx.graphs.policies import Policy
from dlx.request import Output, SamplingParams
from dlx.tasks import MIX, Sample, check, installed, sample

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
MAX_TOKENS = 224
SEED = 7
SCHEMA = 1

Chat = list[Mapping[str, str]]


class Decoder(Protocol):
    """What is evaluated: an LLM, or whatever answers like one."""

    def generate(self, prompts: Sequence[Chat], params: SamplingParams, progress: bool = False) -> list[Output]: ...


class Score(NamedTuple):
    """Sums over prompts; `tokens` counts stop ids, `nfe` denoise forwards; prefill forwards stand apart."""

    prompts: int
    correct: int
    tokens: int
    nfe: int
    prefill_forwards: int

    @property
    def accuracy(self) -> float:
        """Correct answers ÷ prompts."""
        return self.correct / self.prompts

    @property
    def tokens_per_forward(self) -> float:
        """Summed tokens ÷ summed denoise forwards."""
        return self.tokens / max(self.nfe, 1)

    def describe(self) -> dict[str, float]:
        """The sums and their ratios as JSON-able data."""
        ratios = {"accuracy": self.accuracy, "tokens_per_forward": self.tokens_per_forward}
        return {**{name: round(value, 4) for name, value in ratios.items()}, **self._asdict()}


class Record(NamedTuple):
    """What one threshold gave: a score a task."""

    threshold: float
    tasks: dict[str, Score]

    @property
    def total(self) -> Score:
        """The sums over all tasks."""
        return Score(*(sum(column) for column in zip(*self.tasks.values(), strict=True)))

    def describe(self) -> dict[str, Any]:
        """JSON-able data; Any, as tasks nest.

        tokens_per_forward            the aggregate: tokens up to and including the stop id ÷ nfe, each summed
        trainer_tokens_per_forward    what the trainer's evaluation averages: Σ tokens ÷ Σ forwards over all
                                      prompts, stop ids counted, prefill and commits not: the same figure
        task_mean_tokens_per_forward  the unweighted mean of the tasks' own figures
        """
        figure = round(self.total.tokens_per_forward, 4)
        mean = sum(score.tokens_per_forward for score in self.tasks.values()) / len(self.tasks)
        return {
            **self.total.describe(),
            "trainer_tokens_per_forward": figure,
            "task_mean_tokens_per_forward": round(mean, 4),
            "tasks": {name: score.describe() for name, score in self.tasks.items()},
        }


def evaluate(
    llm: Decoder,
    tasks: Sequence[str] | None = None,
    n: int = 100,
    thresholds: Sequence[float] = THRESHOLDS,
    *,
    max_tokens: int = MAX_TOKENS,
    seed: int = SEED,
    progress: bool = False,
) -> list[Record]:
    """Decode n held-out prompts a task at each threshold, at temperature 0, and check every answer.

    tasks  names, in the order that draws the prompts; None takes the bundled model's that are installed
    →      one record a threshold, in order
    Raises ConfigError  if n < 1, or a task is unknown or lacks its package
           RequestError if a threshold is not from 0 to 1
    """
    samples = prompts(list(installed(MIX)) if tasks is None else tasks, n, seed)
    chats: list[Chat] = [[{"role": "user", "content": asked.prompt}] for asked in samples]
    records = []
    for threshold in thresholds:
        params = SamplingParams(max_tokens=max_tokens, threshold=threshold)
        outputs = llm.generate(chats, params, progress=progress)
        records.append(Record(threshold, _scores(samples, outputs)))
    return records


def prompts(tasks: Sequence[str], n: int, seed: int = SEED) -> list[Sample]:
    """n held-out samples of each task, task by task from one generator, as the trainer evaluates.

    Raises ConfigError  if n < 1, no task is named, or one is unknown or lacks its package
    """
    if n < 1 or not tasks:
        raise ConfigError(f"n={n} prompts of {len(tasks)} tasks leave nothing to evaluate; use 1 or more of each")
    rng = Random(seed)
    return [sample(rng, {task: 1.0}, want_held=True) for task in tasks for _ in range(n)]


def report(
    records: Sequence[Record], *, model: str, policy: Policy, made: Mapping[str, str | None], **how: object
) -> dict[str, Any]:
    """The JSON-able record of an evaluation, as profiles/runs keeps it; `how` is added as it is."""
    return {
        "schema": SCHEMA,
        "kind": "evaluation",
        "model": model,
        "policy": policy.describe(),
        "made": dict(made),
        **how,
        "thresholds": {f"{record.threshold:g}": record.describe() for record in records},
    }


def table(records: Sequence[Record]) -> str:
    """Accuracy and tokens per forward as text: a row a task, a column a threshold."""
    rows = [["task", *(f"{record.threshold:g}" for record in records)]]
    for name in records[0].tasks:
        rows.append([name, *(_cell(record.tasks[name]) for record in records)])
    rows.append(["all", *(_cell(record.total) for record in records)])
    rows.append(["forwards", *(str(record.total.nfe) for record in records)])
    rows.append(["prefills", *(str(record.total.prefill_forwards) for record in records)])
    return "\n".join(f"{head:9}" + "".join(f"{cell:>13}" for cell in cells) for head, *cells in rows)


def _cell(score: Score) -> str:
    return f"{score.accuracy:.3f} {score.tokens_per_forward:5.2f}"


def _scores(samples: Sequence[Sample], outputs: Sequence[Output]) -> dict[str, Score]:
    scores: dict[str, Score] = {}
    for asked, output in zip(samples, outputs, strict=True):
        one = (1, check(asked, output.text), output.tokens, output.nfe, output.prefill_forwards)
        before = scores.get(asked.task, Score(0, 0, 0, 0, 0))
        scores[asked.task] = Score(*(a + b for a, b in zip(before, one, strict=True)))
    return scores
