"""A setting from a flag, a variable, a file: which wins, and how each is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dlx.cli import main
from dlx.cli.flags import ENGINE, SAMPLING, SECTIONS, SERVE
from dlx.serve.options import Options
from dlx.settings import Settings

Capture = pytest.CaptureFixture[str]
Show = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No DLX_* of whoever runs the tests."""
    for name in os.environ:
        if name.startswith("DLX_"):
            monkeypatch.delenv(name)


@pytest.fixture
def show(capsys: Capture) -> Show:
    """What `dlx config show` says with these arguments: setting → [value, source]."""

    def run(*args: str) -> dict[str, Any]:
        assert main(["config", "show", "--json", *args]) == 0
        return {name: (one["value"], one["source"]) for name, one in json.loads(capsys.readouterr().out).items()}

    return run


@pytest.fixture
def refused(capsys: Capture) -> Callable[..., str]:
    """The error of a command line that ends with 2."""

    def run(*args: str) -> str:
        code, (out, err) = main(list(args)), capsys.readouterr()
        assert (code, out, err[:7], err.count("\n")) == (2, "", "error: ", 1)
        return err[7:-1]

    return run


def file(tmp_path: Path, text: str) -> str:
    (tmp_path / "s.yaml").write_text(text)
    return str(tmp_path / "s.yaml")


def test_a_flag_wins_over_a_variable_that_over_the_file_that_over_the_default(
    show: Show, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert show()["engine.max_num_seqs"] == (8, "default")
    path = file(tmp_path, "max_num_seqs: 2\n")
    assert show("--config", path)["engine.max_num_seqs"] == (2, f"{path}: max_num_seqs")
    monkeypatch.setenv("DLX_MAX_NUM_SEQS", "3")
    assert show("--config", path)["engine.max_num_seqs"] == (3, "DLX_MAX_NUM_SEQS")
    assert show("--config", path, "--max-num-seqs", "4")["engine.max_num_seqs"] == (4, "--max-num-seqs")


def test_a_flag_turns_off_what_the_file_turns_on(show: Show, tmp_path: Path) -> None:
    path = file(tmp_path, "engine: {unroll: true}\n")
    assert show("--config", path)["engine.unroll"] == (True, f"{path}: engine.unroll")
    assert show("--config", path, "--no-unroll")["engine.unroll"] == (False, "--unroll")


def test_sections_of_a_file_set_their_own(show: Show, tmp_path: Path) -> None:
    path = file(tmp_path, "graphs: off\nengine: {seed: 3}\nsampling: {seed: 4, stop: [a, b]}\nserve: {port: 0}\n")
    said = show("--config", path)
    assert [said[name][0] for name in ("engine.graphs", "engine.seed", "sampling.seed", "serve.port")] == [
        "off",
        3,
        4,
        0,
    ]
    assert said["sampling.stop"][0] == ["a", "b"]


def test_dlx_config_names_the_file_where_no_flag_does(
    show: Show, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DLX_CONFIG", file(tmp_path, "page_size: 32\n"))
    assert show()["engine.page_size"][0] == 32
    other = tmp_path / "other.yaml"
    other.write_text("page_size: 64\n")
    assert show("--config", str(other))["engine.page_size"][0] == 64


@pytest.mark.parametrize(
    ("variable", "text", "setting", "expected"),
    [
        ("DLX_GRAPHS", "off", "engine.graphs", "off"),
        ("DLX_PREFIX_CACHING", "false", "engine.prefix_caching", False),
        ("DLX_GPU_MEMORY_UTILIZATION", "0.5", "engine.gpu_memory_utilization", 0.5),
        ("DLX_ADAPTERS", '{"a": "x/y"}', "engine.adapters", {"a": "x/y"}),
        ("DLX_DUMMY_SEED", "5", "engine.seed", 5),
        ("DLX_SEED", "6", "sampling.seed", 6),
        ("DLX_TEMPERATURE", "1", "sampling.temperature", 1.0),
        ("DLX_STOP", '["a,b"]', "sampling.stop", ["a,b"]),
        ("DLX_FIXED", "[[0, 5]]", "sampling.fixed", [[0, 5]]),
        ("DLX_PORT", "9", "serve.port", 9),
        ("DLX_API_KEY", "hush", "serve.api_key", "…"),
    ],
)
def test_a_variable_is_read_as_its_field_asks(
    show: Show, monkeypatch: pytest.MonkeyPatch, variable: str, text: str, setting: str, expected: object
) -> None:
    monkeypatch.setenv(variable, text)
    assert show()[setting] == (expected, variable)


def test_an_empty_variable_is_none(show: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLX_MAX_NUM_SEQS", "")
    assert show()["engine.max_num_seqs"] == (8, "default")


@pytest.mark.parametrize(
    ("variable", "text", "parts"),
    [
        ("DLX_GRAPHS", "on", ["DLX_GRAPHS='on'", "'off', 'compile' or 'capture'"]),
        ("DLX_MAX_NUM_SEQS", "0", ["DLX_MAX_NUM_SEQS='0'", "greater than or equal to 1"]),
        ("DLX_MAX_NUM_SEQS", "1.5", ["DLX_MAX_NUM_SEQS='1.5'", "valid integer"]),
        ("DLX_UNROLL", "perhaps", ["DLX_UNROLL='perhaps'", "valid boolean"]),
        ("DLX_ADAPTERS", "{a: x}", ["DLX_ADAPTERS=", "not JSON"]),
        ("DLX_THRESHOLD", "2", ["DLX_THRESHOLD=2.0", "from 0 to 1"]),
        ("DLX_DEVICE", "tpu", ["DLX_DEVICE='tpu'", "use cpu or cuda"]),
        ("DLX_PORT", "70000", ["DLX_PORT='70000'", "less than or equal to 65535"]),
        ("DLX_DEBUG", "yes", ["DLX_DEBUG='yes'", "use 0 or 1"]),
        ("DLX_GRAPSH", "off", ["DLX_GRAPSH is no variable", "did you mean DLX_GRAPHS?"]),
        ("DLX_QQQ", "1", ["DLX_QQQ is no variable", "use one of"]),
        ("DLX_CONFIG", "/gone.yaml", ["/gone.yaml cannot be read"]),
    ],
)
def test_a_wrong_variable_is_named_with_what_is_allowed(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, variable: str, text: str, parts: list[str]
) -> None:
    monkeypatch.setenv(variable, text)
    err = refused("config", "show")
    assert [part for part in parts if part not in err] == []


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("max_num_seqs: 0\n", ["s.yaml: max_num_seqs=0", "greater than or equal to 1"]),
        ("engine: {max_num_seqs: '8'}\n", ["s.yaml: engine.max_num_seqs='8'", "valid integer"]),
        ("engine: {max_num_seq: 8}\n", ["s.yaml: engine.max_num_seq is no setting", "did you mean max_num_seqs?"]),
        ("sampling: {max_tokens: true}\n", ["s.yaml: sampling.max_tokens=True", "an integer"]),
        ("sampling: {treshold: 0.5}\n", ["sampling.treshold", "did you mean threshold?"]),
        ("samplin: {threshold: 0.5}\n", ["samplin is no setting", "did you mean sampling?"]),
        ("serve: [port]\n", ["serve is a list", "keys and values"]),
        ("page_size: 16\nengine: {page_size: 16}\n", ["page_size is there twice"]),
        ("serve: {host: 0.0.0.0}\n", ["s.yaml: serve.host='0.0.0.0' can be reached by others"]),
    ],
)
def test_a_wrong_file_is_named_with_what_is_allowed(
    refused: Callable[..., str], tmp_path: Path, text: str, parts: list[str]
) -> None:
    err = refused("config", "show", "--config", file(tmp_path, text))
    assert [part for part in parts if part not in err] == []


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--max-num-seqs 0", ["--max-num-seqs=0 is not allowed", "greater than or equal to 1"]),
        ("--device tpu", ["--device='tpu'", "use cpu or cuda"]),
        ("--adapters a", ["'a' is not allowed", "NAME=VALUE"]),
        ("--lora x --load-format dummy", ["--lora='x'", "random weights"]),
        ("--policy frob", ["--policy='frob' is unknown; use one of single_bd"]),
        ("--page-size 8", ["--page-size=8", "block length 16", "use 16"]),
        ("--max-model-len 99999", ["--max-model-len=99999", "2048 positions"]),
        ("--block-length 5", ["blocks of 5 tokens", "16, 32"]),
        ("--graphs capture --device cpu", ["--graphs='capture'", "CUDA device, not cpu"]),
    ],
)
def test_flags_that_contradict_the_machine_or_the_model_are_named_with_both_values(
    refused: Callable[..., str], flags: str, parts: list[str]
) -> None:
    err = refused("config", "check", *flags.split())
    assert [part for part in parts if part not in err] == []


def test_two_models_are_one_too_many(refused: Callable[..., str]) -> None:
    assert "two models: a, and --model b" in refused("serve", "a", "--model", "b")


def test_a_secret_is_never_shown(refused: Callable[..., str], capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLX_API_KEY", "hush")
    assert main(["config", "show"]) == 0
    assert "hush" not in capsys.readouterr().out
    monkeypatch.setenv("DLX_PORT", "-1")
    assert "hush" not in refused("config", "show")


def test_a_file_that_is_fine_is_said_to_be(capsys: Capture, tmp_path: Path) -> None:
    assert main(["config", "check", file(tmp_path, "block_length: 32\n"), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "fine: sdar on cpu, blocks of 32, pages of 32, 2048 tokens a row\n"


def test_names_of_flags_and_variables_are_unique() -> None:
    flags = [knob.flag for section in SECTIONS for knob in section.knobs.values()]
    assert len(flags) == len(set(flags))
    assert not {f"--{s.name}" for s in SECTIONS} & set(flags)
    assert not {s.name for s in SECTIONS} & set(ENGINE.knobs)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.name)
def test_every_setting_has_a_description(section: Any) -> None:
    assert [name for name, knob in section.knobs.items() if len(knob.description) < 5] == []


def test_the_schema_holds_every_setting(capsys: Capture) -> None:
    assert main(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    parts = schema["properties"]
    assert set(Settings.model_fields) < set(parts)
    assert set(parts["sampling"]["properties"]) == set(SAMPLING.knobs)
    assert set(parts["serve"]["properties"]) == set(Options.model_fields) == set(SERVE.knobs)
    assert schema["additionalProperties"] is False
