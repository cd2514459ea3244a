"""`dlx chat --url`: a talk with a server, whatever it answers."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dlx import LLM, SamplingParams
from dlx.cli import main, remote
from dlx.errors import EngineError
from tests.serve.fake import ANSWER, FakeEngine
from tests.serve.served import Served

Capture = pytest.CaptureFixture[str]
Talk = Callable[..., tuple[int, str, str]]


@pytest.fixture
def talk(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Exit code, stdout and stderr of a talk of these lines."""
    for name in [name for name in os.environ if name.startswith("DLX_")]:
        monkeypatch.delenv(name)

    def run(url: str, lines: str, *args: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode()), encoding="utf-8"))
        return (main(["chat", "--url", url, *args]), *capsys.readouterr())

    return run


def test_a_server_answers_as_the_model_does_here(model: Served, talk: Talk, nano_llm: LLM) -> None:
    code, out, _ = talk(model.url + "/v1/", "12 + 30 = ?\n7 + 5 = ?\n", "--max-tokens", "16")
    turns: list[dict[str, str]] = []
    for line in ("12 + 30 = ?", "7 + 5 = ?"):
        turns.append({"role": "user", "content": line})
        (output,) = nano_llm.generate(list(turns), SamplingParams(max_tokens=16))
        turns.append({"role": "assistant", "content": output.text})
    assert (code, out) == (0, "".join(f"{turn['content']}\n" for turn in turns[1::2]))


def test_sampling_flags_reach_the_server(fake: Served, talk: Talk) -> None:
    code, out, _ = talk(fake.url, "hi\n", "--threshold", "0.5", "--seed", "3", "--stop", "zzz", "--json")
    assert (code, json.loads(out)) == (0, {"text": ANSWER, "url": fake.url})
    params: SamplingParams = fake.engine.asked[-1]
    assert (params.threshold, params.seed, params.stop) == (0.5, 3, ("zzz",))


def test_what_the_server_refuses_is_told_and_the_talk_goes_on(fake: Served, talk: Talk) -> None:
    code, out, err = talk(fake.url, "hi\n/reset\nhi\n", "--max-tokens", "99999999")
    assert (code, out) == (0, "")
    assert err.count(f"error: {fake.url} answered 400: ") == 2


def test_a_lost_server_and_a_wrong_key_are_told(talk: Talk) -> None:
    assert "no server at http://127.0.0.1:9: " in talk("http://127.0.0.1:9", "hi\n")[2]
    with Served(FakeEngine(), api_key="hush") as served:
        assert "answered 401: " in talk(served.url, "hi\n", "--api-key", "loud")[2]
        assert talk(served.url, "hi\n", "--api-key", "hush")[1] == ANSWER + "\n"


@pytest.mark.parametrize("url", ["nonsense", "file:///etc", ""])
def test_an_address_is_one_of_http(talk: Talk, url: str) -> None:
    code, _, err = talk(url, "hi\n")
    assert (code, err) == (2, f"error: --url {url} is not allowed; use http://HOST:PORT\n")


def test_settings_of_an_engine_are_the_servers(talk: Talk) -> None:
    code, _, err = talk("http://127.0.0.1:9", "hi\n", "--max-num-seqs", "2")
    assert (code, err[:7]) == (2, "error: ")
    assert "--max-num-seqs is a matter of the server" in err


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        ([b'data: {"choices": [{"delta": {"content": "a"}}]}\n'], "in the middle of an answer"),
        ([b'data: {"error": {"message": "no memory"}}\n', b"data: [DONE]\n"], "broke off: no memory"),
    ],
)
def test_an_answer_that_breaks_off_is_no_answer(lines: list[Any], named: str) -> None:
    stream: Iterator[bytes] = iter(lines)
    with pytest.raises(EngineError, match=named):
        list(remote.deltas(stream))
