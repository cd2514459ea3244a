"""The command line: exit codes, messages, and what goes to stdout."""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
import timeit
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

import dlx
from dlx import cli, doctor, errors
from dlx.cli import loading
from dlx.graphs.policies import POLICIES
from dlx.request import Chunk, Finish, Output, SamplingParams, Timings

if TYPE_CHECKING:
    from dlx import LLM

ROOT = Path(__file__).parents[2]
Patch = pytest.MonkeyPatch


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


class FakeLLM:
    """Answers with the number of the turn, or raises that turn's error; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.params: list[SamplingParams] = []
        self.errors: dict[int, BaseException] = {}
        self.engine = SimpleNamespace(worker=SimpleNamespace(max_len=1000))
        # one character is one token
        self.tokenizer = SimpleNamespace(chat=lambda messages: "".join(m["content"] for m in messages))

    def stream(self, prompt: object, params: SamplingParams) -> Iterator[Chunk]:
        self.asked.append(prompt)
        self.params.append(params)
        turn = len(self.asked)
        if turn in self.errors:
            raise self.errors[turn]
        text = f"answer {turn}"
        output = Output(0, [9], text, [5], Finish.STOP, 2, 1, 1, Timings(0.0, 0.1, 0.2))
        yield Chunk(0, text, [5], Finish.STOP, [], output)


@pytest.fixture
def fake(monkeypatch: Patch) -> FakeLLM:
    """The model that every command finds."""
    llm = FakeLLM()
    monkeypatch.setattr(loading, "load", lambda found, **more: nullcontext(llm))
    return llm


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: Patch) -> Run:
    """Run a command line in this process."""

    def run(*args: str, stdin: bytes = b"") -> Ran:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        code, (out, err) = cli.main(list(args)), capsys.readouterr()
        return Ran(code, out, err)

    return run


def process(*args: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments."""
    command = [sys.executable, *args]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=120)


def generated(*flags: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """Run `dlx generate` in a process of its own."""
    return process("-m", "dlx.cli", "generate", "12 + 30 = ?", "--device", "cpu", *flags, stdout=stdout)


WRONG_VALUES = [
    *("--threshold nan", "--threshold -1", "--threshold 2", "--temperature -0.5", "--temperature inf"),
    *("--max-tokens 0", "--max-nfe 0", "--seed -1"),
]
WRONG_WORDS = [
    *("--threshold high", "--max-tokens 1.5", "--seed 1e3", "--graphs on", "--device tpu", "--dtype int8"),
    *("--bogus", "--seed", "--seed 1 --seed 2", "stray"),
]


@pytest.mark.parametrize("flags", WRONG_VALUES + WRONG_WORDS)
def test_a_wrong_flag_is_a_usage_error_that_names_it(run: Run, monkeypatch: Patch, flags: str) -> None:
    monkeypatch.setattr(loading, "load", lambda found, **more: pytest.fail("a model was loaded"))
    code, out, err = run("generate", "hi", *flags.split())
    name = flags.split()[0]
    assert (code, out, err[:7], err.count("\n")) == (2, "", "error: ", 1)
    assert (name + "=" if flags in WRONG_VALUES else name) in err


@pytest.mark.parametrize("line", ["frobnicate", "chat hi", "bench nothing", "config nothing"])
def test_a_wrong_command_is_a_usage_error(run: Run, line: str) -> None:
    code, out, err = run(*line.split())
    assert (code, out) == (2, "")
    assert err.endswith("See --help.\n")


@pytest.mark.parametrize(
    ("prompt", "named"),
    [("", "is empty"), (" \n", "is empty"), ("é\udcff", "at character 1"), ("-", "at character 2")],
)
def test_no_prompt_and_no_utf8_are_request_errors(run: Run, fake: FakeLLM, prompt: str, named: str) -> None:
    code, out, err = run("generate", prompt, stdin=b"ab\xff")
    assert (code, out, fake.asked) == (2, "", [])
    assert named in err


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        *((kind("x"), 2) for kind in (errors.ConfigError, errors.PolicyError, errors.RequestError)),
        (errors.ModelError("x"), 3),
        *((kind("x"), 4) for kind in (errors.CapacityError, MemoryError, torch.OutOfMemoryError)),
        *((kind("x"), 1) for kind in (errors.EngineError, errors.ShapeError, ZeroDivisionError)),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_error_has_its_exit_code(run: Run, fake: FakeLLM, error: BaseException, expected: int) -> None:
    fake.errors[1] = error
    code, out, err = run("generate", "hi")
    assert (code, out) == (expected, "")
    assert "Traceback" not in err


def test_debug_shows_the_traceback_of_its_own_command_alone(run: Run, fake: FakeLLM) -> None:
    fake.errors = {1: errors.ModelError("a"), 2: ZeroDivisionError("b")}
    code, _, err = run("generate", "hi", "--debug")
    assert code == 3
    assert "Traceback" in err
    assert err.endswith("error: a\n")
    assert run("generate", "hi").err == "error: ZeroDivisionError: b; --debug shows where\n"


def test_a_message_is_short_and_without_control_characters(run: Run, fake: FakeLLM) -> None:
    fake.errors[1] = errors.ModelError("\x1b[31m" + "long " * 1000)
    err = run("generate", "hi").err
    assert "\x1b" not in err
    assert len(err) < 1100


def test_a_prompt_goes_through_the_chat_template_unless_raw(run: Run, fake: FakeLLM) -> None:
    assert run("generate", "hi") == (0, "answer 1\n", "")
    assert run("generate", "--raw", "--", "--debug") == (0, "answer 2\n", "")
    assert fake.asked == [[{"role": "user", "content": "hi"}], "--debug"]


def test_a_hyphen_reads_the_prompt_from_stdin(run: Run, fake: FakeLLM) -> None:
    run("generate", "-", "--raw", stdin="line 1\nline 2 é\n".encode())
    assert fake.asked == ["line 1\nline 2 é\n"]


def test_flags_become_sampling_parameters(run: Run, fake: FakeLLM) -> None:
    flags = "--threshold 0.5 --temperature 1 --seed 7 --max-tokens 9 --max-nfe 3 --ignore-eos"
    run("generate", "hi", *flags.split())
    rest: dict[str, Any] = {"max_tokens": 9, "max_nfe": 3, "ignore_eos": True}
    assert fake.params == [SamplingParams(threshold=0.5, temperature=1.0, seed=7, **rest)]


def test_json_holds_the_answer_its_figures_and_what_made_it(
    run: Run, monkeypatch: Patch, nano_llm: LLM, nano: Path
) -> None:
    monkeypatch.setattr(loading, "load", lambda found, **more: nullcontext(nano_llm))
    chat: Any = [{"role": "user", "content": "12 + 30 = ?"}]
    nano_llm.generate(chat, SamplingParams(max_tokens=32))  # from now on the prompt's pages are cached
    code, out, err = run("generate", "12 + 30 = ?", "--json", "--max-tokens", "32")
    assert (code, err) == (0, "")
    record = json.loads(out)
    (output,) = nano_llm.generate(chat, SamplingParams(max_tokens=32))
    for name in ("text", "token_ids", "finish_reason", "tokens", "nfe"):
        assert record.pop(name) == getattr(output, name)
    assert record.pop("prefill_forwards") in (0, 1)  # none where the prefix was there
    assert record.pop("tokens_per_forward") == output.tokens / output.nfe
    assert set(record.pop("timings")) == {"admitted_s", "first_block_s", "total_s"}
    assert record.pop("policy") == json.loads(json.dumps(nano_llm.policy.describe()))
    assert record == {"model": str(nano), "device": "cpu", "graphs": "off"}


def test_chat_sends_the_turns_before(run: Run, fake: FakeLLM) -> None:
    assert run("chat", stdin=b"one\n\n  two  \n")[:2] == (0, "answer 1\nanswer 2\n")
    assert [m["role"] for m in fake.asked[1]] == ["user", "assistant", "user"]
    assert [m["content"] for m in fake.asked[1]] == ["one", "answer 1", "two"]


def test_reset_forgets_and_exit_leaves(run: Run, fake: FakeLLM) -> None:
    code, out, err = run("chat", stdin=b"one\n/reset\ntwo\n/exit\nthree\n")
    assert (code, out) == (0, "answer 1\nanswer 2\n")
    assert "forgotten" in err
    assert fake.asked[1:] == [[{"role": "user", "content": "two"}]]


def test_an_error_in_one_turn_does_not_end_the_chat(run: Run, fake: FakeLLM) -> None:
    fake.errors[2] = errors.RequestError("too long")
    code, out, err = run("chat", stdin=b"one\ntwo\n\xff\nthree")
    assert (code, out) == (0, "answer 1\nanswer 3\n")
    assert ("error: too long\n" in err, "not valid UTF-8" in err) == (True, True)
    assert [m["content"] for m in fake.asked[-1]] == ["one", "answer 1", "three"]


def test_a_long_chat_forgets_its_oldest_exchanges_and_says_so(run: Run, fake: FakeLLM) -> None:
    fake.engine.worker.max_len = 45  # "aaaaaaaaaa" + "answer 1" + "bbbbbbbbbb" + 20 is 48
    err = run("chat", "--max-tokens", "20", stdin=b"aaaaaaaaaa\nbbbbbbbbbb\n").err
    assert [m["content"] for m in fake.asked[1]] == ["bbbbbbbbbb"]
    assert "oldest exchanges forgotten: 1" in err


def test_doctor_reports_versions_the_bundled_model_and_its_graphs(run: Run) -> None:
    code, out, _ = run("doctor", "--json")
    report = json.loads(out)
    assert (code, report["dlx"], report["torch"]) == (0, dlx.__version__, version("torch"))
    assert report["card"]["arch"] == "SDARForCausalLM"
    for name, policy in POLICIES.items():
        assert report[f"graphs of {name}"]["places"] == policy.N + 1
        assert report[f"graphs of {name}"]["step rows"] == [1, 2, 4, 8]
    lines = run("doctor").out.splitlines()
    assert [line.split("  ")[0] for line in lines] == list(report)


def test_doctor_without_the_bundled_model_exits_3(run: Run, monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr("dlx.config.TINY", tmp_path / "gone")
    assert run("doctor")[0] == 3


@pytest.mark.parametrize(
    ("told", "cost", "kept"),
    [(None, {1: 0.1, 8: 0.2}, [1, 8, 1]), (None, {1: 0.2, 8: 0.1}, [1, 8, 8]), ("8", {}, [])],
)
def test_threads_are_as_omp_num_threads_says_else_the_faster_number(
    monkeypatch: Patch, told: str | None, cost: dict[int, float], kept: list[int]
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: taken[-1] if taken else 8)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(timeit, "repeat", lambda *_, **__: [9.0, cost[taken[-1]]])
    monkeypatch.setenv("OMP_NUM_THREADS", told or "")
    doctor.choose_threads()
    assert taken == kept


@pytest.mark.parametrize(
    ("flags", "expected", "named"),
    [
        ("--policy frob", 2, "--policy='frob' is unknown; use one of single_bd, multi_bd"),
        ("--model no/such/folder", 3, "no/such/folder"),
        ("--graphs capture", 2, "graphs='capture' needs a CUDA device"),
        ("--block-length 5", 2, "blocks of 5 tokens"),
        ("--max-tokens 99999", 2, "max_tokens=99999"),
        ("--device cuda", 4, "--device cpu"),
    ],
)
def test_what_the_model_refuses_is_told_in_one_line(
    run: Run, monkeypatch: Patch, flags: str, expected: int, named: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = run("generate", "hi", *flags.split())
    assert (code, out, err[:7], err.count("\n")) == (expected, "", "error: ", 1)
    assert named in err


HEAVY = ("torch", "transformers", "triton", "tokenizers", "numpy", "jinja2", "fastapi", "uvicorn", "lm_eval", "yaml")


def loaded_by(*lines: str) -> tuple[str, list[str]]:
    """Stdout of command lines of one process, and what it imported, of dlx and of what is heavy."""
    code = f"import sys; from dlx.cli import main\nfor line in {lines}: main(line.split())\n"
    code += f"names = [n for n in sys.modules if n in {(*HEAVY, 'pydantic')} or n.startswith('dlx')]\n"
    done = process("-c", code + "print(sorted(names), file=sys.stderr)")
    return done.stdout, ast.literal_eval(done.stderr.splitlines()[-1])


def test_help_imports_the_command_line_alone() -> None:
    assert loaded_by("--help")[1] == ["dlx", "dlx.cli", "dlx.cli.notices", "dlx.errors"]


def test_version_names_torch_without_importing_it() -> None:
    out, names = loaded_by("--version")
    assert out == f"dlx {dlx.__version__}\ntorch {version('torch')}\n"
    assert not {*HEAVY, "pydantic"} & set(names)


def test_help_of_every_command_and_completion_import_nothing_heavy() -> None:
    lines = [f"{name} --help" for name in cli.COMMANDS]
    assert not set(HEAVY) & set(loaded_by(*lines, "completion bash", "completion zsh", "completion fish")[1])


def test_a_wrong_flag_is_refused_before_anything_heavy() -> None:
    assert not set(HEAVY) & set(loaded_by("generate hi --threshold 2", "generate hi --max-num-seqs 0")[1])


def test_stdout_of_a_process_is_the_answer_alone(nano: Path) -> None:
    done = generated("--model", str(nano))
    assert (done.returncode, done.stderr, bool(done.stdout.strip())) == (0, "", True)
    assert done.stdout.replace("\n", "").isprintable()


def test_a_reader_that_went_away_is_told_by_the_exit_code_alone(nano: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = generated("--model", str(nano), stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
