"""Commands that measure speed, with a model's shape and random weights; and the search for faster kernels."""

from __future__ import annotations

import json as encoding
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from dlx.cli.flags import ENGINE, NONE, PLAIN, Call, Given, Whole, asked, flags, taking
from dlx.cli.notices import command, set_logging
from dlx.errors import ConfigError

if TYPE_CHECKING:
    from dlx.bench.scene import How, Scene

# settings that a measurement takes
HOW = ("graphs", "device", "dtype", "forwards", "unroll", "quantization", "kv_cache_dtype", "max_num_batched_tokens")
MEASURED = flags(ENGINE, only=HOW)

bench = App(name="bench", help="Measure speed with a model's shape and random weights; `dlx eval` measures quality.")


def integers(text: str) -> list[int]:
    """1,8,32 as numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{text!r} is not allowed; write integers and commas, as 1,8,32") from None


@Parameter(name="*")
@dataclass(frozen=True)
class Stage:
    """What is measured."""

    shape: Annotated[str, Parameter(help="Name of a shape, as `dlx bench shapes` lists them, or a folder.")] = "sdar-8b"
    block: Annotated[Whole | None, Parameter(help="Tokens a block; else as the shape was trained.")] = None
    blocks: Annotated[Whole, Parameter(help="Blocks of a row that decode at once.")] = 1
    context: Annotated[Whole, Parameter(help="Tokens before the answer.")] = 1024
    requests: Annotated[Whole, Parameter(help="Requests at once.")] = 1
    accept: Annotated[Whole, Parameter(help="Tokens accepted a forward.")] = 4

    def scene(self) -> Scene:
        from dlx.bench.arguments import asked as staged

        return staged(self.shape, self.block, self.blocks, self.context, self.requests, self.accept)


@Parameter(name="*")
@dataclass(frozen=True)
class Report:
    """How a record is told."""

    json: Annotated[bool, Parameter(help="Print the record as one JSON object.")] = False
    out: Annotated[Path | None, Parameter(help="Write the record to this file, too.")] = None

    def tell(self, record: dict[str, Any], in_words: Callable[[dict[str, Any]], str]) -> None:
        from dlx.bench.arguments import write

        print(encoding.dumps(record, default=str) if self.json else in_words(record))
        write(self.out, record)


STAGE, REPORT = Stage(), Report()


def how(engine: Given, call: Call) -> How:
    """How it runs, of the settings."""
    from dlx.bench.scene import How

    set_logging(call.debug)
    found = asked(call, engine).engine
    return How(**{name: getattr(found, name) for name in HOW})


def sentence(record: dict[str, Any]) -> str:
    from dlx.bench.report import sentence

    return sentence(record)


@bench.command
@taking(engine=MEASURED)
def latency(
    *,
    stage: Stage = STAGE,
    steps: Annotated[Whole, Parameter(help="Forwards timed; 0 leaves decoding out.")] = 64,
    prefill: Annotated[Whole, Parameter(help="Also time the prefill of so many tokens.")] = 0,
    first_block: Annotated[bool, Parameter(help="Also time a prompt of --context tokens to its first block.")] = False,
    report: Report = REPORT,
    engine: Given = NONE,
    call: Call = PLAIN,
) -> None:
    """Milliseconds a forward against the floor of reading the weights once, at a forced schedule."""
    chosen = how(engine, call)
    from dlx.bench import latency

    report.tell(latency(stage.scene(), chosen, steps, command(), prefill, first_block), sentence)


@bench.command
@taking(engine=MEASURED)
def throughput(
    *,
    stage: Stage = STAGE,
    max_tokens: Annotated[Whole, Parameter(help="Tokens of each answer.")] = 256,
    rows: Annotated[Whole | None, Parameter(help="Requests that decode at once; else all.")] = None,
    report: Report = REPORT,
    engine: Given = NONE,
    call: Call = PLAIN,
) -> None:
    """Requests through the engine until all are done, and where the wall time goes."""
    chosen = how(engine, call)
    from dlx.bench import throughput

    report.tell(throughput(stage.scene(), chosen, max_tokens, rows, command()), sentence)


@bench.command
@taking(engine=MEASURED)
def startup(
    *,
    stage: Stage = STAGE,
    buckets: Annotated[str, Parameter(help="Rows of the steps.")] = "1,8,32",
    prefill: Annotated[Whole, Parameter(help="Tokens of the prefill graph; 0 is none.")] = 2048,
    policy: Annotated[str, Parameter(help="Decoding policy, by name.")] = "single_bd",
    only: Annotated[Literal["cold", "packed"] | None, Parameter(help="Else both.")] = None,
    pack: Annotated[Path | None, Parameter(help="A pack that is there already; else one is written.")] = None,
    report: Report = REPORT,
    engine: Given = NONE,
    call: Call = PLAIN,
) -> None:
    """Seconds until graphs can be replayed, cold and from a pack; weights apart."""
    chosen, rows = how(engine, call), integers(buckets)
    from dlx.bench import startup
    from dlx.bench.start import STARTS

    starts = [only] if only else STARTS
    report.tell(startup(stage.scene(), chosen, rows, prefill, policy, command(), starts, pack), sentence)


@bench.command
@taking(engine=MEASURED)
def roofline(*, stage: Stage = STAGE, report: Report = REPORT, engine: Given = NONE, call: Call = PLAIN) -> None:
    """The step by kernel: bytes, floor, time; on a CPU the bytes and the floor alone."""
    chosen = how(engine, call)
    from dlx.bench import roofline
    from dlx.bench.report import lines

    report.tell(roofline(stage.scene(), chosen, command()), lambda record: "\n".join(lines(record)))


@bench.command
def serve(
    url: Annotated[str, Parameter(help="Where the server is.")] = "http://127.0.0.1:8000",
    /,
    *,
    clients: Annotated[Whole, Parameter(help="Clients that ask at once, each one question after the other.")] = 16,
    seconds: Annotated[float, Parameter(help="How long they ask.")] = 30.0,
    questions: Annotated[Whole, Parameter(help="Different questions, of the bundled tasks.")] = 32,
    max_tokens: Annotated[Whole, Parameter(help="Tokens of an answer at most.")] = 48,
    api_key: Annotated[str | None, Parameter(help="The server's key; else $DLX_API_KEY.")] = None,
    report: Report = REPORT,
    call: Call = PLAIN,
) -> int:
    """A running server under load: latency, requests a second, lost answers and such as differ from those alone."""
    set_logging(call.debug)
    key = asked(call).key if api_key is None else api_key
    from dlx.bench import clients as load

    record = load.serve(url.rstrip("/").removesuffix("/v1"), clients, seconds, questions, max_tokens, key)
    report.tell(record | {"command": command()}, load.sentence)
    return int(bool(record["failed"] or record["lost"]))


@bench.command
def shapes(*, json: Annotated[bool, Parameter(help="Print one JSON list.")] = False) -> None:
    """List the names that --shape takes."""
    from dlx.bench.arguments import SHAPES

    names = [path.stem for path in sorted(SHAPES.glob("*.json"))]
    print(encoding.dumps(names) if json else "\n".join(names))


def tune(
    *,
    op: Annotated[list[str] | None, Parameter(help="Ops, by name; else all.")] = None,
    shape: Annotated[list[str] | None, Parameter(help="Shapes, by name; else all.")] = None,
    rows: Annotated[list[Whole] | None, Parameter(help="Positions of a forward; else all.")] = None,
    block: Annotated[Whole | None, Parameter(help="Search in a whole step with blocks of so many tokens.")] = None,
    context: Annotated[Whole, Parameter(help="With --block: tokens before the answer.")] = 1024,
    requests: Annotated[Whole, Parameter(help="With --block: requests that decode.")] = 1,
    budget_s: Annotated[float, Parameter(help="Seconds in all, shared evenly.")] = 540.0,
    folder: Annotated[Path | None, Parameter(help="Of records; else where dlx reads them.")] = None,
    trials: Annotated[Path | None, Parameter(help="Append every configuration with its time to this file.")] = None,
    json: Annotated[bool, Parameter(help="Print one JSON object a case.")] = False,
    debug: Annotated[bool, Parameter(help="Log everything, and show tracebacks.")] = False,
) -> None:
    """Search launch configurations of the kernels on this GPU, and record them."""
    set_logging(debug)
    from dlx.bench.tuning import scenes
    from dlx.bench.tuning import tune as within
    from dlx.ops.bench.__main__ import SUITES
    from dlx.ops.bench.shapes import SHAPES
    from dlx.ops.bench.tune import run
    from dlx.ops.tuned import folder as recorded

    for what, names, known in (("op", op, SUITES), ("shape", shape, SHAPES)):
        if wrong := [name for name in names or () if name not in known]:
            raise ConfigError(f"--{what} {wrong[0]} is unknown; use one of {', '.join(known)}")
    ops, names, target = op or [*SUITES], shape or [*SHAPES], folder or recorded()
    if block:
        within(scenes(names, block, context, requests, rows or ()), ops, budget_s, target, trials, command(), json)
    else:
        run(ops, names, rows or (), budget_s, target, trials, command(), json)
