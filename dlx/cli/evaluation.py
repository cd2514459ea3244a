"""`dlx eval`: nothing heavy is imported until it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

Whole = Annotated[int, Parameter(converter=lambda _, tokens: int(tokens[0].value))]  # 1.5 is refused


def evaluate(
    model: Annotated[str | None, Parameter(help="Folder of a checkpoint, or ORG/NAME; else ours.")] = None,
    /,
    *,
    tasks: Annotated[str | None, Parameter(help="tiny, tiny_NAME, gsm8k, humaneval, or lm-eval's; by commas.")] = None,
    limit: Annotated[Whole | None, Parameter(help="Prompts of each task; else all, 100 of tiny.")] = None,
    config: Annotated[Path | None, Parameter(help="Run file with engine: and eval:; flags go before it.")] = None,
    data: Annotated[list[str] | None, Parameter(help="TASK=FILE, of gsm8k and humaneval.")] = None,
    out: Annotated[Path | None, Parameter(help="Folder of results.json.")] = None,
    save_results: Annotated[bool | None, Parameter(help="Write every answer to samples.jsonl.")] = None,
    chat: Annotated[bool | None, Parameter(help="Use the chat template, if there is one.", negative="--raw")] = None,
    include_path: Annotated[Path | None, Parameter(help="Folder of lm-eval's task files; their code runs.")] = None,
    confirm_run_unsafe_code: Annotated[bool | None, Parameter(help="Run programs that the model writes.")] = None,
    policy: Annotated[str | None, Parameter(help="Decoding policy, by name; the model's own if left out.")] = None,
    threshold: Annotated[float | None, Parameter(help="Confidence that accepts a token, 0 to 1.")] = None,
    temperature: Annotated[float | None, Parameter(help="Else the task's own, mostly 0.")] = None,
    seed: Annotated[Whole | None, Parameter(help="Key of the first request's draws.")] = None,
    max_tokens: Annotated[Whole | None, Parameter(help="Tokens to answer with at most; else the task's own.")] = None,
    max_nfe: Annotated[Whole | None, Parameter(help="Denoise forwards of an answer at most.")] = None,
    max_num_seqs: Annotated[Whole | None, Parameter(help="Prompts that decode at once; else 32.")] = None,
    block_length: Annotated[Whole | None, Parameter(help="Tokens a block, as it was trained.")] = None,
    graphs: Annotated[Literal["off", "compile", "capture"] | None, Parameter(help="Else capture on CUDA, off.")] = None,
    device: Annotated[Literal["cpu", "cuda"] | None, Parameter(help="Else CUDA if there is a GPU.")] = None,
    dtype: Annotated[Literal["float32", "bfloat16"] | None, Parameter(help="Of weights and K/V.")] = None,
    json: Annotated[bool, Parameter(help="Print the results as one JSON object.")] = False,
) -> None:
    """Measure accuracy, tokens per forward and speed on tasks, through lm-eval (extra `eval`)."""
    from dlx.cli.notices import command
    from dlx.doctor import settle
    from dlx.harness.files import read
    from dlx.harness.options import options
    from dlx.live import dumps

    settle(device)
    from dlx.harness.run import evaluation, table

    given: dict[str, Any] = read(config) if config is not None else {}
    llm = {"max_num_seqs": max_num_seqs, "policy": policy, "block_length": block_length, "graphs": graphs,
        "device": device, "dtype": dtype, "model": model}  # fmt: skip
    params = {"threshold": threshold, "temperature": temperature, "seed": seed, "max_tokens": max_tokens,
        "max_nfe": max_nfe}  # fmt: skip
    given["llm"] = {"max_num_seqs": 32} | given.get("llm", {}) | _said(llm)
    given["params"] = given.get("params", {}) | _said(params)
    more = {"limit": limit, "out": out, "save_results": save_results, "chat": chat, "include_path": include_path,
        "confirm_run_unsafe_code": confirm_run_unsafe_code}  # fmt: skip
    more |= {"tasks": None if tasks is None else tuple(filter(None, map(str.strip, tasks.split(","))))}
    more |= {"data": None if data is None else dict(_pair(one) for one in data)}
    results = evaluation(options(**given | _said(more)), command(), progress=sys.stderr.isatty())
    print(dumps(results) if json else table(results))


def _said(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _pair(text: str) -> tuple[str, str]:
    from dlx.errors import ConfigError

    name, equals, path = text.partition("=")
    if not equals or not path:
        raise ConfigError(f"data={text!r} is not TASK=FILE; use gsm8k=test.jsonl, say")
    return name, path
