"""Commands about graphs: compile them for later, and record where the time of their steps goes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from dlx.cli import loading
from dlx.cli.flags import ENGINE, NONE, PLAIN, SAMPLING, Call, Given, Whole, asked, chosen, flags, taking
from dlx.cli.notices import command, notice, set_logging
from dlx.doctor import settle


@taking(engine=flags(ENGINE, without=("pack",)))
def pack(
    model: Annotated[Path | None, Parameter(help="The same as --model.")] = None,
    /,
    *,
    out: Annotated[Path, Parameter(help="Folder of packs.")] = Path("~/.cache/dlx/packs"),
    rows: Annotated[list[Whole] | None, Parameter(help="Buckets of the step; else all.")] = None,
    tokens: Annotated[list[Whole] | None, Parameter(help="Buckets of the prefill; else all.")] = None,
    shape_only: Annotated[bool, Parameter(help="The same as --load-format dummy.")] = False,
    json: Annotated[bool, Parameter(help="Print the folder in a JSON object.")] = False,
    engine: Given = NONE,
    call: Call = PLAIN,
) -> None:
    """Compile a model's graphs once, and keep them in a folder for a fast start; prints the folder."""
    from dlx.live import dumps, waiting

    set_logging(call.debug)
    found = asked(call, chosen(engine, model, load_format="dummy" if shape_only else None))
    with waiting("compiling"):
        settle(found.engine.device)

        from dlx.config import Config
        from dlx.pack import make

        config = found.told(lambda: Config.from_args(**found.engine.given()))
        if found.engine.graphs is None and config.graphs == "off":
            config = config.model_copy(update={"graphs": "compile"})
        folder = make(config, out, rows or (), tokens or (), command())
    print(dumps({"folder": folder}) if json else folder)


@taking(engine=flags(ENGINE), sampling=flags(SAMPLING))
def profile(
    prompt: Annotated[str, Parameter(help="The prompt; - reads it from stdin.")],
    /,
    *,
    start: Annotated[Whole, Parameter(help="Steps that run before, unrecorded.")] = 4,
    steps: Annotated[Whole, Parameter(help="Steps to record.")] = 8,
    out: Annotated[Path, Parameter(help="Folder of the trace and the table.")] = Path("dlx-profile"),
    tool: Annotated[Literal["torch", "cuda"], Parameter(help="cuda: tell nsys or ncu what to record.")] = "torch",
    json: Annotated[bool, Parameter(help="Print the table as one JSON object.")] = False,
    engine: Given = NONE,
    sampling: Given = NONE,
    call: Call = PLAIN,
) -> None:
    """Record steps of one answer: a trace, and where their time goes. The answer goes on past stop tokens."""
    from dlx.live import dumps

    set_logging(call.debug)
    found = asked(call, engine, sampling, {"max_num_seqs": 1, "unroll": True})
    params = replace(found.sampling, ignore_eos=True)
    text = loading.prompted(prompt)
    with loading.load(found) as llm:
        from dlx.profile import Profile, profiled

        with profiled(llm.engine, Profile(start, steps, out, tool), command()) as seen:
            for _ in llm.stream([{"role": "user", "content": text}], params):
                if seen.done:
                    break
    if seen.table is not None:
        print(dumps(seen.record(seen.table)) if json else seen.table)
        notice(f"{out}/trace.json is for Perfetto, {out}/table.json holds the table")
