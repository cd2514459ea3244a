"""The command line: one function a command, and the map from errors to exit codes.

    0 done   1 a step failed   2 usage, configuration, policy or request   3 model   4 memory or device
    130 interrupted   141 the reader of stdout went away

Stdout carries results only; progress, notices and errors go to stderr. Heavy imports are inside commands.
"""

from __future__ import annotations

import io
import logging
import os
import shlex
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

import dlx
from dlx import commands
from dlx.doctor import examine, installed, settle
from dlx.errors import CapacityError, ConfigError, DlxError, ModelError, PolicyError, RequestError
from dlx.harness import command as harness
from dlx.request import SamplingParams

if TYPE_CHECKING:
    from dlx.llm import LLM, Message

log = logging.getLogger("dlx")

EXITS = {CycloptsError: 2, ConfigError: 2, PolicyError: 2, RequestError: 2, ModelError: 3, CapacityError: 4}
MESSAGE_CHARS = 1000  # of one error; --debug shows all
Graphs = Literal["off", "compile", "capture"]
Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "bfloat16"]
Whole = Annotated[int, Parameter(converter=lambda _, tokens: int(tokens[0].value))]  # 1.5 is refused

app = App(
    name="dlx",
    help="A compiled inference runtime for diffusion language models.",
    version=lambda: f"dlx {dlx.__version__}\ntorch {installed('torch')}",
    default_parameter=Parameter(negative=()),
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
)
app.command(commands.convert)
app.command(commands.models)
app.command(harness.evaluate, name="eval")


@Parameter(name="*")
@dataclass(frozen=True)
class Flags:
    """What every command that decodes takes; None is the model's, the policy's or the device's own value."""

    model: Annotated[Path | None, Parameter(help="Folder of a checkpoint, or ORG/NAME; else ours.")] = None
    policy: Annotated[str | None, Parameter(help="Decoding policy, by name; the model's own if left out.")] = None
    threshold: Annotated[float | None, Parameter(help="Confidence that accepts a token, 0 to 1.")] = None
    temperature: Annotated[float, Parameter(help="0 takes the likeliest token, above 0 draws.")] = 0.0
    seed: Annotated[Whole | None, Parameter(help="Key of the draws; else a random one.")] = None
    max_tokens: Annotated[Whole, Parameter(help="Tokens to answer with at most.")] = 256
    max_nfe: Annotated[Whole | None, Parameter(help="Denoise forwards to spend at most.")] = None
    block_length: Annotated[Whole | None, Parameter(help="Tokens a block, as it was trained.")] = None
    graphs: Annotated[Graphs | None, Parameter(help="Else capture on CUDA, off on a CPU.")] = None
    device: Annotated[Device | None, Parameter(help="Else CUDA if there is a GPU.")] = None
    dtype: Annotated[Dtype | None, Parameter(help="Of weights and K/V.")] = None
    pack: Annotated[Path | None, Parameter(help="Folder of a pack, or of packs; else $DLX_PACK.")] = None
    lora: Annotated[Path | None, Parameter(help="Adapter to merge: a folder in PEFT's layout, or ORG/NAME.")] = None
    ignore_eos: Annotated[bool, Parameter(help="Go on past stop tokens.")] = False
    json: Annotated[bool, Parameter(help="Print an answer and its figures as one JSON object.")] = False
    debug: Annotated[bool, Parameter(help="Log everything, and show tracebacks.")] = False

    def params(self) -> SamplingParams:
        """The checked sampling parameters; a wrong one is told before a model is loaded."""
        names = {f.name for f in fields(SamplingParams)} & {f.name for f in fields(self)}
        params = SamplingParams(**{name: getattr(self, name) for name in names})
        params.check()
        return params


DEFAULTS = Flags()


@app.command
def generate(
    prompt: Annotated[str, Parameter(help="The prompt; - reads it from stdin.")],
    /,
    *,
    flags: Flags = DEFAULTS,
    raw: Annotated[bool, Parameter(help="Send the prompt as it is, without the chat template.")] = False,
) -> None:
    """Answer one prompt."""
    from dlx.live import tell

    set_logging(flags.debug)
    params = flags.params()
    text = checked(sys.stdin.read() if prompt == "-" else prompt)
    with load(flags) as llm:
        tell(llm, text if raw else [{"role": "user", "content": text}], params, as_json=flags.json)


@app.command
def chat(*, flags: Flags = DEFAULTS) -> None:
    """Talk, turn by turn: /reset forgets, /exit leaves."""
    from dlx.live import ask, tell

    set_logging(flags.debug)
    params = flags.params()
    messages: list[Message] = []
    with load(flags) as llm:
        notice("/reset forgets, /exit leaves")
        while (line := ask()) not in (None, "/exit"):
            if line == "/reset":
                messages = []
                notice("forgotten")
            elif line:
                try:
                    turn = [*messages, {"role": "user", "content": checked(line)}]
                    turn = trimmed(llm, turn, params.max_tokens)
                    output = tell(llm, turn, params, as_json=flags.json)
                    messages = [*turn, {"role": "assistant", "content": output.text}]
                except DlxError as error:
                    complain(error)


@app.command
def pack(
    model: Annotated[Path | None, Parameter(help="Folder of a checkpoint; else the bundled model.")] = None,
    /,
    *,
    out: Annotated[Path, Parameter(help="Folder of packs.")] = Path("~/.cache/dlx/packs"),
    rows: Annotated[list[Whole] | None, Parameter(help="Buckets of the step; else all.")] = None,
    tokens: Annotated[list[Whole] | None, Parameter(help="Buckets of the prefill; else all.")] = None,
    policy: Annotated[str | None, Parameter(help="Decoding policy, by name; the model's own if left out.")] = None,
    max_num_seqs: Annotated[Whole, Parameter(help="Rows that decode at once; generate and chat take 1.")] = 8,
    max_model_len: Annotated[Whole | None, Parameter(help="Tokens of prompt and answer.")] = None,
    block_length: Annotated[Whole | None, Parameter(help="Tokens a block, as it was trained.")] = None,
    forwards: Annotated[Whole, Parameter(help="Forwards that one launch may run.")] = 1,
    graphs: Annotated[Graphs | None, Parameter(help="Else capture on CUDA, compile on a CPU.")] = None,
    device: Annotated[Device | None, Parameter(help="Else CUDA if there is a GPU.")] = None,
    dtype: Annotated[Dtype | None, Parameter(help="Of weights and K/V.")] = None,
    shape_only: Annotated[bool, Parameter(help="Random weights: config.json is enough.")] = False,
    debug: Annotated[bool, Parameter(help="Log everything, and show tracebacks.")] = False,
) -> None:
    """Compile a model's graphs once, and keep them in a folder for a fast start; prints the folder."""
    from dlx.live import waiting

    set_logging(debug)
    with waiting("compiling"):
        settle(device)

        from dlx.config import Config
        from dlx.pack import make

        config = Config.from_args(model, policy, graphs, device, dtype, max_num_seqs=max_num_seqs,
            max_model_len=max_model_len, block_length=block_length, forwards=forwards,
            load_format="dummy" if shape_only else "safetensors")  # fmt: skip
        if graphs is None and config.graphs == "off":
            config = config.model_copy(update={"graphs": "compile"})
        print(make(config, out, rows or (), tokens or (), command()))


@app.command
def profile(
    prompt: Annotated[str, Parameter(help="The prompt; - reads it from stdin.")],
    /,
    *,
    flags: Flags = DEFAULTS,
    start: Annotated[Whole, Parameter(help="Steps that run before, unrecorded.")] = 4,
    steps: Annotated[Whole, Parameter(help="Steps to record.")] = 8,
    out: Annotated[Path, Parameter(help="Folder of the trace and the table.")] = Path("dlx-profile"),
    tool: Annotated[Literal["torch", "cuda"], Parameter(help="cuda: tell nsys or ncu what to record.")] = "torch",
    forwards: Annotated[Whole, Parameter(help="Forwards a step, one after the other.")] = 1,
) -> None:
    """Record steps of one answer: a trace, and where their time goes. The answer goes on past stop tokens."""
    from dlx.live import dumps

    set_logging(flags.debug)
    params = replace(flags.params(), ignore_eos=True)
    text = checked(sys.stdin.read() if prompt == "-" else prompt)
    with load(flags, forwards=forwards, unroll=True) as llm:
        from dlx.profile import Profile, profiled

        with profiled(llm.engine, Profile(start, steps, out, tool), command()) as seen:
            for _ in llm.stream([{"role": "user", "content": text}], params):
                if seen.done:
                    break
    if seen.table is not None:
        print(dumps(seen.record(seen.table)) if flags.json else seen.table)
        notice(f"{out}/trace.json is for Perfetto, {out}/table.json holds the table")


@app.command
def doctor(*, json: Annotated[bool, Parameter(help="Print one JSON object.")] = False) -> int:
    """Print versions, devices, compilers, and what would be captured for the bundled model."""
    from dlx.live import dumps, in_words

    report, code = examine()
    width = max(map(len, report))
    print(dumps(report) if json else "\n".join(f"{k:<{width}}  {in_words(v)}" for k, v in report.items()))
    return code


def load(flags: Flags, **more: Any) -> LLM:
    """The model as the flags and `more` describe it."""
    from dlx.live import waiting

    with waiting("loading the model"):
        from dlx.llm import LLM

        settle(flags.device)
        names = ("policy", "graphs", "device", "dtype", "block_length", "pack", "lora")
        return LLM(flags.model, max_num_seqs=1, **{name: getattr(flags, name) for name in names}, **more)


def checked(prompt: str) -> str:
    """The prompt, if it says something in valid Unicode."""
    if not prompt.strip():
        raise RequestError("the prompt is empty; give some text, or - to read it from stdin")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt is not valid UTF-8 at character {error.start}; convert it") from error
    return prompt


def trimmed(llm: LLM, turn: list[Message], max_tokens: int) -> list[Message]:
    """The turn without its oldest exchanges, as far as the model's length cannot hold them and an answer."""
    kept, longest = turn, llm.engine.worker.max_len
    while len(kept) > 1 and len(llm.tokenizer.chat(kept)) + max_tokens > longest:
        kept = kept[2:]
    if len(kept) < len(turn):
        gone = (len(turn) - len(kept)) // 2
        notice(f"oldest exchanges forgotten: {gone}; talk and --max-tokens must fit into {longest} tokens")
    return kept


def set_logging(debug: bool) -> None:
    """Log to stderr: warnings, and with `debug` everything."""
    log.setLevel(logging.DEBUG if debug else logging.WARNING)
    log.handlers = [logging.StreamHandler()] if debug else []


def command() -> str:
    """This command line, for records."""
    return shlex.join(["dlx", *sys.argv[1:]])


def notice(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def complain(error: Exception) -> int:
    """Tell an error on stderr, its traceback first with --debug; its exit code."""
    from dlx.live import clean

    if log.isEnabledFor(logging.DEBUG):
        log.debug("traceback", exc_info=error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's own
        error = CapacityError(f"out of memory: {error}; use a smaller --model, or --device cpu")
    known = isinstance(error, DlxError | CycloptsError)
    text = clean(str(error) if known else f"{type(error).__name__}: {error}; --debug shows where")
    text += " See --help." if isinstance(error, CycloptsError) else ""
    notice("error: " + (text if len(text) <= MESSAGE_CHARS else text[:MESSAGE_CHARS] + " …"))
    return next((code for kind, code in EXITS.items() if isinstance(error, kind)), 1)


def words(argv: list[str]) -> list[str]:
    """The arguments with a lone - put behind a --: cyclopts would take it for an option."""
    given = [word for word in argv if word != "-"]
    return [*given, "--", "-"] if len(given) == len(argv) - 1 and "--" not in argv else argv


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    set_logging(debug=False)
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    try:
        given = words(sys.argv[1:] if argv is None else argv)
        code = app(given, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
    except KeyboardInterrupt:
        notice("interrupted")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit
        return 141
    except Exception as error:
        return complain(error)
    return code or 0


if __name__ == "__main__":
    sys.exit(main())
