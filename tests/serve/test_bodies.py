"""Bodies that are wrong are refused in OpenAI's envelope, by the name of the field, and the server goes on.

Each case bears the number that it has in docs/faults.md.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from tests.serve.fake import ANSWER, FakeEngine
from tests.serve.served import Served

JSON = {"content-type": "application/json"}
HELLO = [{"role": "user", "content": "Hello"}]


def refused(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error of an answer that is the envelope and nothing else."""
    assert (response.status_code, list(response.json())) == (status, ["error"]), response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["code"]
    return error


def field(name: str, value: str) -> bytes:
    """A chat whose one field is written as given."""
    return f'{{"messages": {json.dumps(HELLO)}, {json.dumps(name)}: {value}}}'.encode()


RAW = {
    "1 empty": b"",
    "1 no JSON": b"hello",
    "1 truncated": b'{"messages": [{"role": "user"',
    "1 no object": b"[1, 2]",
    "2 no UTF-8": b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "3 NaN": field("temperature", "NaN"),
    "3 NaN for an integer": field("n", "NaN"),
    "3 Infinity": field("top_p", "Infinity"),
    "3 1e999": field("temperature", "1e999"),
    "3 NaN inside dlx": field("dlx", '{"threshold": NaN}'),
    "4 nested arrays": b"[" * 100_000,
    "4 nested arrays in a field": field("metadata", "[" * 100_000 + "]" * 100_000),
    "12 NUL in a model": field("model", '"a\\u0000b"').replace(b'"model"', b'"dlx"'),
    "13 lone surrogate": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
}


@pytest.mark.parametrize("raw", RAW.values(), ids=RAW.keys())
def test_what_is_no_such_body_is_refused(fake: Served, raw: bytes) -> None:
    error = refused(fake.client.post("/v1/chat/completions", content=raw, headers=JSON))
    assert error["type"] == "invalid_request_error"
    assert fake.engine.asked == []


@pytest.mark.parametrize("counted", [True, False], ids=["5 Content-Length", "5 chunked"])
def test_a_body_over_the_cap_is_refused_without_being_held(fake: Served, counted: bool) -> None:
    piece, pieces = b" " * (1 << 20), 64

    def parts() -> Iterator[bytes]:
        for _ in range(pieces):
            yield piece

    headers = {**JSON, **({"content-length": str(pieces * len(piece))} if counted else {})}
    before = psutil.Process().memory_info().rss
    error = refused(fake.client.post("/v1/completions", content=parts(), headers=headers), 413)
    assert error["code"] == "body_too_large"
    assert psutil.Process().memory_info().rss - before < 32 << 20


def test_a_method_without_a_body_is_refused_before_one_is_read(fake: Served) -> None:  # cases 5 and 7
    refused(fake.client.put("/v1/completions", content=b" " * (5 << 20), headers=JSON), 405)


def test_a_body_of_another_content_type_is_refused(fake: Served) -> None:  # case 6
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        response = fake.client.post("/v1/completions", content=b'{"prompt": "a"}', headers={"content-type": kind})
        assert refused(response, 415)["code"] == "unsupported_media_type"


ROUTES = {
    "7 unknown": ("GET", "/v1/nothing", 404),
    "7 unknown, with a body": ("POST", "/nothing", 404),
    "7 wrong method": ("GET", "/v1/completions", 405),
    "7 wrong method, with a body": ("DELETE", "/v1/chat/completions", 405),
    "7 PUT": ("PUT", "/health", 405),
    "7 a slash too many": ("GET", "/v1/models/", 404),
    "12 traversal": ("GET", "/v1/models/..%2f..%2f..%2fetc%2fpasswd", 404),
    "12 dots": ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
    "12 absolute": ("GET", "//etc/passwd", 404),
    "12 NUL": ("GET", "/v1/models/a%00b", 404),
}


@pytest.mark.parametrize(("method", "path", "status"), ROUTES.values(), ids=ROUTES.keys())
def test_a_route_that_is_not_there_is_told_in_the_envelope(fake: Served, method: str, path: str, status: int) -> None:
    body = b"{}" if method != "GET" else None
    refused(fake.client.request(method, fake.url + path, content=body, headers=JSON), status)


def test_head_is_no_method_of_any_route(fake: Served) -> None:  # case 7
    assert fake.client.head("/health").status_code == 405


NAMES = ["gpt-4", "", "../../etc/passwd", "/etc/passwd", "%2e%2e", "a\0b", "nano/", "Nano", "x" * 5000]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_another_name_is_not_found(fake: Served, name: str) -> None:  # cases 8 and 12
    for route in ("chat/completions", "completions", "tokenize"):
        error = refused(fake.client.post(f"/v1/{route}", json={"model": name, "prompt": "a", "messages": HELLO}), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert len(error["message"]) < 300


@pytest.mark.parametrize("path", ["org/nano", "org%2Fnano"])
def test_a_model_whose_name_has_a_slash_is_found(path: str) -> None:
    with Served(FakeEngine(), {"org/nano": None}) as served:
        assert served.client.get(f"{served.url}/v1/models/{path}").json()["id"] == "org/nano"


PARTS = {
    "13 picture": {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/a.png"}},
    "13 file": {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
    "13 link-local": {"type": "input_image", "image_url": "http://169.254.0.1/latest"},
    "13 sound": {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
    "13 text and more": {"type": "text", "text": "a", "image_url": "file:///etc/passwd"},
}


class Reach:
    """Files and sockets that a thread opens while it is watched."""

    def __init__(self) -> None:
        self.thread: int | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[object, ...]) -> None:
        if event in ("open", "socket.connect", "socket.getaddrinfo") and threading.get_ident() == self.thread:
            self.seen.append(f"{event} {args[:2]}")


@pytest.fixture(scope="module")
def reach() -> Reach:
    return Reach()


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS.keys())
def test_nothing_is_fetched_for_a_message(fake: Served, reach: Reach, part: dict[str, object]) -> None:
    fake.client.get("/health")
    reach.seen.clear()
    reach.thread = fake.inside(threading.get_ident)
    try:
        body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, part]}]}
        error = refused(fake.client.post("/v1/chat/completions", json=body))
        refused(fake.client.post("/v1/completions", json={"prompt": "a", "model": "/etc/passwd"}), 404)
    finally:
        reach.thread = None
    assert error["param"].startswith("messages[0].content")
    assert reach.seen == []


def test_text_parts_are_joined(fake: Served) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    for content in (parts, "Hello"):
        assert fake.client.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]}
        ).is_success
    first, second = fake.engine.prompts
    assert first == second


def test_of_equal_keys_the_last_counts(fake: Served) -> None:  # case 14
    raw = b'{"prompt": "a", "max_tokens": 1, "max_tokens": 7}'
    assert fake.client.post("/v1/completions", content=raw, headers=JSON).is_success
    assert fake.engine.asked[0].max_tokens == 7


def test_unknown_fields_are_ignored_and_told_of(fake: Served) -> None:  # case 14
    body = {"prompt": "a", "user": "me", "store": True, "frobnicate": 1, "evil\r\nset-cookie: a": 2, "": 3}
    response = fake.client.post("/v1/completions", json=body)
    assert response.json()["choices"][0]["text"] == ANSWER
    assert response.headers["x-dlx-warning"] == "ignored: frobnicate, evil??set-cookie??a, ?"
    assert "set-cookie" not in response.headers


def test_unknown_fields_of_dlx_are_refused(fake: Served) -> None:  # case 14
    error = refused(fake.client.post("/v1/completions", json={"prompt": "a", "dlx": {"treshold": 0.5}}))
    assert error["param"] == "dlx.treshold"


def test_a_preflight_of_another_origin_is_denied(fake: Served) -> None:  # case 17
    headers = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    response = fake.client.options("/v1/chat/completions", headers=headers)
    refused(response, 405)
    simple = fake.client.post("/v1/completions", json={"prompt": "a"}, headers={"origin": "https://evil.example"})
    assert not [name for r in (response, simple) for name in r.headers if name.startswith("access-control")]


def test_an_id_is_echoed_if_it_is_fit_for_a_log(fake: Served) -> None:
    assert fake.client.get("/health", headers={"x-request-id": "a-1"}).headers["x-request-id"] == "a-1"
    assert fake.client.get("/health", headers={"x-request-id": "a b"}).headers["x-request-id"] != "a b"
