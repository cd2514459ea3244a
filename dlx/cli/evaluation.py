"""The command that measures quality: accuracy, tokens per forward and speed on tasks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from dlx.cli.flags import ENGINE, NONE, SAMPLING, Call, Given, asked, chosen, flags, taking
from dlx.cli.notices import command, set_logging
from dlx.harness.options import OWN, Options, options
from dlx.sources import Section

EVAL = Section("eval", Options)


@taking(evaluation=flags(EVAL, only=OWN), engine=flags(ENGINE), sampling=flags(SAMPLING))
def evaluate(
    model: Annotated[Path | None, Parameter(help="The same as --model.")] = None,
    /,
    *,
    config: Annotated[Path | None, Parameter(help="Run file with engine: and eval:, as docs/keys.md says.")] = None,
    json: Annotated[bool, Parameter(help="Print the results as one JSON object.")] = False,
    debug: Annotated[bool, Parameter(help="Log everything, and show tracebacks.")] = False,
    evaluation: Given = NONE,
    engine: Given = NONE,
    sampling: Given = NONE,
) -> None:
    """Measure accuracy, tokens per forward and speed on tasks, through lm-eval (extra `eval`)."""
    set_logging(debug)
    found = asked(Call(), chosen(engine, model), sampling)
    given: dict[str, Any] = {}
    if config is not None:
        from dlx.harness.files import read

        given = read(config)
    given["llm"] = {"max_num_seqs": 32} | given.get("llm", {}) | found.engine.given()
    given["params"] = given.get("params", {}) | {name: one.value for name, one in found.values["sampling"].items()}
    asks = options(**given | apart(evaluation.values()))

    from dlx.doctor import settle
    from dlx.harness.run import evaluation as run
    from dlx.harness.run import table
    from dlx.live import dumps

    settle(found.engine.device)
    results = found.told(lambda: run(asks, command(), progress=sys.stderr.isatty()))
    print(dumps(results) if json else table(results))


def apart(said: dict[str, Any]) -> dict[str, Any]:
    """The flags, with tasks that stand in one word, by commas, apart."""
    if "tasks" not in said:
        return said
    return said | {"tasks": tuple(one.strip() for word in said["tasks"] for one in word.split(",") if one.strip())}
