"""What the page on serving asks of a server is answered, by one over the nano model."""

from __future__ import annotations

import argparse
import shlex

import pytest

from tests.pages import ROOT, blocks, commands
from tests.serve.served import Served

PAGE = ROOT / "docs" / "serving.md"
URL = "http://127.0.0.1:8000"
CURLS = [line for line in commands(PAGE) if line.startswith("curl ")]


def curl(line: str) -> tuple[str, dict[str, str], str | None]:
    """The path, headers and body of a curl command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("-H", action="append", default=[])
    parser.add_argument("-d")
    said = parser.parse_args(shlex.split(line)[1:])
    assert said.url.startswith(URL)
    headers = dict(one.split(": ", 1) for one in said.H)
    return said.url.removeprefix(URL), headers, said.d


@pytest.mark.parametrize("line", CURLS)
def test_a_request_of_the_page_is_answered(model: Served, line: str) -> None:
    path, headers, body = curl(line)
    answer = model.client.request("POST" if body else "GET", path, headers=headers, content=body)
    assert answer.status_code == 200, answer.text


def test_every_route_of_the_page_is_there(model: Served) -> None:
    for row in PAGE.read_text().splitlines():
        if row.startswith(("| `GET", "| `POST")):
            for path in (word for word in row.split("|")[1].replace("`", " ").split() if word.startswith("/")):
                method = "OPTIONS"
                assert model.client.request(method, path).status_code == 405, path


def test_the_client_of_the_page_is_answered(model: Served, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks(PAGE, "python")
    text = block.replace(URL, model.url).replace('"tiny"', '"nano"')
    exec(compile(text, "serving.md", "exec", dont_inherit=True), {})
    assert "completion_tokens" in capsys.readouterr().out
