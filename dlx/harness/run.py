"""An evaluation from options to figures and files. Imports lm-eval only when it runs."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlx.errors import ConfigError, DlxError
from dlx.harness.options import Options
from dlx.llm import LLM
from dlx.provenance import provenance
from dlx.request import SamplingParams
from dlx.tasks import MIX, TASKS, installed

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from dlx.harness.model import Answer, Harness

Json = dict[str, Any]  # Any, as results nest

SCHEMA = 1
FILES = ("gsm8k", "humaneval")
SUMS = ("tokens", "nfe", "prefill_forwards")


def evaluation(options: Options, command: str = "", progress: bool = False) -> Json:
    """Evaluate, write what `options.out` asks for, and return the results as JSON-able data.

    tasks   name → prompts, accuracy and its standard error (or lm-eval's own metrics), tokens, nfe, tokens_per_forward,
            nfe_per_sample
    total   the same over all, and seconds, tokens_per_s: tokens ÷ wall time of all generation, prefill included
    Raises ConfigError  before a model is loaded, for what cannot be evaluated; else whatever LLM raises
    """
    check(options)
    params = sampling(options.params)
    out = None if options.out is None else folder(options.out)
    with quiet(), LLM(**options.llm) as llm:
        suits(options, llm)
        chat = llm.tokenizer.templated if options.chat is None else options.chat
        from dlx.harness.model import Harness

        made = provenance(command, llm.config.device)  # of the tree as it is now
        model = Harness(llm, params, tuple(options.params), progress)
        found = run(model, named(options, chat), options, chat)
        config = llm.config
        results = {
            "schema": SCHEMA,
            "kind": "harness",
            "model": config.model.name,
            "policy": llm.policy.describe(),
            "made": made,
            "run": {"device": config.device, "dtype": config.dtype, "graphs": config.graphs,
                "max_num_seqs": config.max_num_seqs},
            "options": json.loads(options.model_dump_json(exclude={"llm"})) | {"chat": chat},
            **figures(model, found["results"]),
        }  # fmt: skip
    if out is not None:
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        if options.save_results:
            lines = [json.dumps(one, ensure_ascii=False) for one in samples(model.answers, found["samples"])]
            (out / "samples.jsonl").write_text("\n".join(lines) + "\n")
    return results


def check(options: Options) -> None:
    """Raise ConfigError for what cannot be evaluated, as far as it shows without a model."""
    if find_spec("lm_eval") is None:
        raise ConfigError("evaluation needs lm-eval, which is not installed; run pip install 'dlx[eval]'")
    for name in FILES:
        if name in options.tasks and name not in options.data:
            raise ConfigError(f"task {name!r} reads a local file; name it with data: --data {name}=FILE.jsonl")
    unknown = set(options.data) - set(FILES) or set(options.data) - set(options.tasks)
    if unknown:
        name = min(unknown)
        raise ConfigError(f"data names {name!r}, which is not asked for or reads no file; use {' or '.join(FILES)}")
    if "humaneval" in options.tasks and not options.confirm_run_unsafe_code:
        raise ConfigError(
            "task 'humaneval' runs programs that the model writes, in a process with 10 s and 1 GiB but with your "
            "rights; pass --confirm-run-unsafe-code (confirm_run_unsafe_code: true) if that is what you want"
        )
    for name in options.tasks:
        if name.startswith("tiny_") and name.removeprefix("tiny_") not in TASKS:
            raise ConfigError(f"task {name!r} is unknown; use tiny, or tiny_NAME with one of {', '.join(TASKS)}")
    if options.save_results and options.out is None:
        raise ConfigError("save_results=True needs a folder; name it with out (output_dir)")
    if options.include_path is not None and not options.include_path.expanduser().is_dir():
        raise ConfigError(f"include_path={str(options.include_path)!r} is not a folder; name one of task files")


def sampling(given: Mapping[str, Any]) -> SamplingParams:
    """Checked sampling parameters. Raises ConfigError  for an unknown name; RequestError for a value."""
    known = [field.name for field in fields(SamplingParams)]
    for name in given:
        if name not in known:
            raise ConfigError(f"params has {name!r}, which SamplingParams has not; use {', '.join(known)}")
    params = SamplingParams(**given)
    params.check()
    return params


def suits(options: Options, llm: LLM) -> None:
    """Raise ConfigError where a run file describes another checkpoint than the one that was loaded."""
    card = llm.card
    if options.family and card.family not in options.family:
        raise ConfigError(f"model_name says {' or '.join(options.family)}, and the checkpoint is {card.family}")
    if options.mask_id is not None and options.mask_id != card.mask_id:
        raise ConfigError(
            f"mask_token_id={options.mask_id} is not the mask id {card.mask_id} of this {card.family} checkpoint; "
            "leave it out"
        )


def named(options: Options, chat: bool) -> dict[str, Task]:
    """The tasks by name: dlx's own, and lm-eval's for all other names."""
    from dlx.harness.tasks import bundled, from_file

    made: dict[str, Task] = {}
    own = [name.removeprefix("tiny_") for name in options.tasks if name.startswith("tiny_")]
    if "tiny" in options.tasks:
        own = [*installed(MIX), *(name for name in own if name not in MIX)]
    if own:
        made |= bundled(list(dict.fromkeys(own)), options.limit)
    for name in FILES:
        if name in options.tasks:
            made[name] = from_file(name, options.data[name], chat)
    theirs = [n for n in options.tasks if n != "tiny" and not n.startswith("tiny_") and n not in FILES]
    return made | loaded(theirs, options.include_path) if theirs else made


def loaded(names: Sequence[str], include_path: Path | None) -> dict[str, Task]:
    """Tasks of lm-eval's own, or of a folder of task files; most read their data from huggingface.co."""
    from lm_eval.tasks import TaskManager

    folder = None if include_path is None else str(include_path.expanduser())
    manager = TaskManager(include_path=folder, include_defaults=False)
    if set(names) - set(manager.all_tasks):  # lm-eval's own, the names of which take it many seconds to read
        manager = TaskManager(include_path=folder)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ConfigError(
            f"task {unknown[0]!r} is unknown; use tiny, {', '.join(FILES)}, or a task of lm-eval's, or name the "
            "folder of its file with include_path"
        )
    try:
        return dict(manager.load(list(names))["tasks"])
    except Exception as error:  # a task file runs code, and data sets are fetched: anything may be raised
        raise ConfigError(f"tasks {', '.join(names)} cannot be loaded: {' '.join(str(error).split())}") from error


def run(model: Harness, tasks: Mapping[str, Task], options: Options, chat: bool) -> Json:
    """lm-eval's own evaluation of the tasks."""
    from lm_eval.evaluator import evaluate

    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)  # lm-eval's own default
    try:
        found = evaluate(
            lm=model,
            task_dict={"tasks": dict(tasks), "groups": {}, "group_map": {}},
            limit=options.limit,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            confirm_run_unsafe_code=options.confirm_run_unsafe_code,
        )
    except DlxError:
        raise
    except ValueError as error:
        raise ConfigError(f"lm-eval refuses: {' '.join(str(error).split())}") from error
    assert found is not None, "there is one rank"
    return dict(found)


def figures(model: Harness, results: Mapping[str, Mapping[str, Any]]) -> Json:
    """What came out, by task and in all."""
    tasks: Json = {}
    for name, metrics in results.items():
        answers = [one for one in model.answers if one.task == name]
        kept = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        if "accuracy,none" in kept:
            kept = {"accuracy": kept["accuracy,none"], "stderr": kept.get("accuracy_stderr,none", 0.0)}
        tasks[name] = {"prompts": len(answers), **kept, **spent(answers)}
    total: Json = {"prompts": len(model.answers), **spent(model.answers)}
    right = [(task["accuracy"], task["prompts"]) for task in tasks.values() if "accuracy" in task]
    if right:
        share = sum(accuracy * n for accuracy, n in right) / sum(n for _, n in right)
        total |= {"accuracy": share, "stderr": (share * (1 - share) / sum(n for _, n in right)) ** 0.5}
    seconds = model.seconds
    return {"tasks": tasks, "total": total | {"seconds": seconds, "tokens_per_s": total["tokens"] / max(seconds, 1e-9)}}


def spent(answers: Sequence[Answer]) -> Json:
    """What some answers cost."""
    sums = {name: sum(getattr(one.output, name) for one in answers) for name in SUMS}
    each = statistics.fmean(one.output.nfe for one in answers) if answers else 0.0
    return {**sums, "tokens_per_forward": sums["tokens"] / max(sums["nfe"], 1), "nfe_per_sample": each}


def samples(answers: Sequence[Answer], found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[Json]:
    """A record an answer: what was asked, what came, how it was judged and what it cost."""
    judged: dict[tuple[str, int], list[Mapping[str, Any]]] = {}  # a record a filter of the task
    for name, many in found.items():
        for one in many:
            judged.setdefault((name, one["doc_id"]), []).append(one)
    for one in answers:
        each, output = judged[one.task, one.doc], one.output
        sample = each[0]
        yield {
            "task": one.task,
            "doc": one.doc,
            "prompt": sample["arguments"][0][0],
            "target": str(sample["target"]),
            "text": one.text,
            **{f"{name},{s['filter']}".removesuffix(",none"): s[name] for s in each for name in s["metrics"]},
            "finish_reason": output.finish_reason,
            "tokens": output.tokens,
            "nfe": output.nfe,
            "prefill_forwards": output.prefill_forwards,
            "tokens_per_forward": output.tokens_per_forward,
            "total_s": output.timings.total_s,
        }


def table(results: Json) -> str:
    """The results as text: a row a task, and what all took."""
    rows = [("task", "prompts", "accuracy", "tokens/forward", "forwards/prompt")]
    for name, one in [*results["tasks"].items(), ("all", results["total"])]:
        accuracy = f"{one['accuracy']:.3f} ± {one['stderr']:.3f}" if "accuracy" in one else "see results"
        costs = f"{one['tokens_per_forward']:.2f}", f"{one['nfe_per_sample']:.1f}"
        rows.append((name, str(one["prompts"]), accuracy, *costs))
    wide = [max(len(row[at]) for row in rows) for at in range(5)]
    lines = ["  ".join(f"{cell:<{n}}" if not at else f"{cell:>{n}}" for at, (cell, n) in enumerate(zip(row, wide)))
        for row in rows]  # fmt: skip
    total = results["total"]
    return "\n".join(
        [*lines, f"{total['tokens']} tokens in {total['seconds']:.1f} s: {total['tokens_per_s']:.1f} tokens/s"]
    )


def folder(path: Path) -> Path:
    """The folder, made if it is not there: an evaluation of hours does not fail at its end."""
    path = path.expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "results.json").touch()
    except OSError as error:
        raise ConfigError(f"out={str(path)!r} cannot be written ({error.strerror}); use another folder") from error
    return path


@contextmanager
def quiet() -> Iterator[None]:
    """lm-eval's warnings away: they tell of its own command line."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
