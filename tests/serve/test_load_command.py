"""`dlx bench serve`: clients against a server that runs, and what is told where it cannot be measured."""

from __future__ import annotations

import json
import os
import shlex

import pytest

from dlx.cli import main
from dlx.cli.notices import command
from tests.serve.fake import FakeEngine
from tests.serve.served import Served

Capture = pytest.CaptureFixture[str]
BRIEF = ["--clients", "4", "--seconds", "2", "--questions", "5", "--max-tokens", "8"]


def test_every_client_hears_what_is_heard_alone(model: Served, capsys: Capture) -> None:
    assert main(["bench", "serve", model.url, *BRIEF, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["asked"] > 4
    assert [record[name] for name in ("failed", "lost", "wrong")] == [0, 0, 0]
    assert record["first_s"]["median"] <= record["total_s"]["median"] <= record["total_s"]["worst"]


def test_a_key_is_sent_and_its_lack_is_told(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("DLX_")]:
        monkeypatch.delenv(name)
    with Served(FakeEngine(), api_key="hush") as served:
        assert main(["bench", "serve", served.url, *BRIEF]) == 1
        assert "answered 401 to a chat" in capsys.readouterr().err
        assert main(["bench", "serve", served.url, *BRIEF, "--api-key", "hush"]) == 0
        monkeypatch.setenv("DLX_API_KEY", "hush")
        assert main(["bench", "serve", served.url, *BRIEF]) == 0
        assert "0 failed, 0 lost" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--api-key", "hush"], ["--api-key=hush"]])
def test_a_record_does_not_hold_the_key(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["dlx", "bench", "serve", *words, "--json"])
    assert command() == shlex.join(["dlx", "bench", "serve", *(w.replace("hush", "KEY") for w in words), "--json"])


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["https://a:1"], "use http://HOST:PORT"),
        (["http://a"], "use http://HOST:PORT"),
        (["http://127.0.0.1:9"], "no server at http://127.0.0.1:9"),
        (["--clients", "0"], "--clients 0"),
        (["--seconds", "nan"], "--seconds nan"),
    ],
)
def test_what_cannot_be_measured_is_a_usage_error(args: list[str], named: str, capsys: Capture) -> None:
    assert main(["bench", "serve", *args]) == 2
    assert named in capsys.readouterr().err
