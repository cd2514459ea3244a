"""Streams, and clients that leave: nothing is lost, nothing goes on for nobody, and a failure is told.

Each case bears the number that it has in docs/faults.md.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
from starlette.types import Message

from dlx.errors import EngineError
from dlx.request import Finish
from dlx.serve.stream import EventStream
from tests.serve.fake import ANSWER, FakeEngine
from tests.serve.served import Served
from tests.serve.test_bodies import refused

STREAM = {"prompt": "a", "stream": True}


def events(text: str) -> list[str]:
    """What a stream said, comments left out."""
    lines = [line for line in text.split("\n") if line and not line.startswith(":")]
    return [line.removeprefix("data: ") for line in lines]


def sent(served: Served, body: dict[str, Any]) -> socket.socket:
    """A request on a connection of its own, which is still open."""
    raw = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}"
    peer = socket.create_connection(("127.0.0.1", httpx.URL(served.url).port), timeout=10)
    peer.sendall(head.encode() + b"\r\n\r\n" + raw)
    return peer


def counted(served: Served, name: str) -> float:
    """A number of /metrics."""
    lines = served.client.get("/metrics").text.splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + " ")), 0.0)


def test_the_last_event_before_done_tells_how_it_ended(fake: Served) -> None:  # case 59
    response = fake.client.post("/v1/completions", json=STREAM)
    assert response.headers["content-type"].startswith("text/event-stream")
    *body, last, done = events(response.text)
    assert done == "[DONE]"
    assert "".join(json.loads(one)["choices"][0]["text"] for one in (*body, last)) == ANSWER
    end = json.loads(last)
    assert (end["choices"][0]["finish_reason"], end["choices"][0]["dlx"]["finish_detail"]) == ("stop", "eos")
    assert end["usage"]["completion_tokens"] == end["usage"]["total_tokens"] - 1 > 0
    assert not any("usage" in json.loads(one) for one in body)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_leaves_ends_its_requests(fake: Served, streamed: bool) -> None:  # cases 51 and 52
    before = counted(fake, 'dlx_requests_total{outcome="aborted",reason="disconnect"}')
    fake.engine.held = True
    with sent(fake, {"prompt": ["a", "b"], "n": 2, "stream": streamed}) as peer:
        fake.until(lambda: len(fake.engine.open) == 4)
        if streamed:
            assert b"data: " in peer.recv(1 << 16)
    fake.until(lambda: not fake.engine.open)
    assert sorted(fake.engine.aborted) == [0, 1, 2, 3]
    assert counted(fake, 'dlx_requests_total{outcome="aborted",reason="disconnect"}') == before + 4


def test_a_client_that_leaves_within_its_body_is_forgotten(fake: Served) -> None:  # case 51
    with socket.create_connection(("127.0.0.1", httpx.URL(fake.url).port)) as peer:
        peer.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{")
        fake.until(lambda: fake.front.places == 1)
    fake.until(lambda: fake.front.places == 0)
    assert fake.engine.asked == []


def test_many_who_connect_and_leave_leave_nothing_behind(fake: Served) -> None:  # case 56
    fake.engine.held = True
    files = len(os.listdir("/proc/self/fd"))
    for n in range(1000):
        sent(fake, {"prompt": "a", "stream": bool(n % 2)}).close()
    fake.until(lambda: fake.front.places == 0 and not fake.engine.open)
    fake.until(lambda: len(os.listdir("/proc/self/fd")) <= files + 2)


def test_a_failure_behind_the_headers_is_an_event_and_no_done_follows(fake: Served) -> None:  # case 60
    fake.engine.ends = (Finish.ERROR, "RuntimeError: boom")
    response = fake.client.post("/v1/completions", json=STREAM)
    assert response.status_code == 200
    *_, kind, error = events(response.text)
    assert kind == "event: error"
    assert json.loads(error)["error"] == {
        "message": "RuntimeError: boom",
        "type": "server_error",
        "param": None,
        "code": "engine_error",
    }
    assert "[DONE]" not in response.text


def test_a_failure_without_a_stream_is_a_500(fake: Served) -> None:  # cases 60 and 101
    fake.engine.ends = (Finish.ERROR, "RuntimeError: boom")
    assert refused(fake.client.post("/v1/completions", json={"prompt": "a", "n": 3}), 500)["code"] == "engine_error"


def test_a_failure_before_the_headers_is_a_500_in_streams_too(fake: Served) -> None:
    fake.engine.failing = EngineError("the engine failed: a step takes too long")
    assert "takes too long" in refused(fake.client.post("/v1/completions", json=STREAM), 500)["message"]


def test_an_error_that_nobody_expected_tells_nothing_of_itself(fake: Served) -> None:
    fake.engine.failing = ZeroDivisionError("secret")
    for streamed in (False, True):
        error = refused(fake.client.post("/v1/completions", json={"prompt": "a", "stream": streamed}), 500)
        assert "secret" not in error["message"]


def test_a_request_whose_time_is_over_is_told_so(fake: Served) -> None:  # case 65
    fake.engine.ends = (Finish.TIMEOUT, "")
    error = refused(fake.client.post("/v1/completions", json={"prompt": "a"}), 504)
    assert (error["type"], error["code"]) == ("timeout_error", "timeout")
    *_, last, done = events(fake.client.post("/v1/completions", json=STREAM).text)
    assert done == "[DONE]"
    assert json.loads(last)["choices"][0]["finish_reason"] == "abort"
    assert json.loads(last)["choices"][0]["dlx"]["finish_detail"] == "timeout"


def test_a_full_queue_says_when_to_come_again(fake: Served) -> None:  # case 64
    fake.engine.held, fake.engine.slots = True, 1
    with sent(fake, STREAM) as running:
        fake.until(lambda: len(fake.engine.open) == 1)
        for streamed in (False, True):
            response = fake.client.post("/v1/completions", json={"prompt": "a", "stream": streamed})
            assert refused(response, 429)["code"] == "queue_full"
            assert response.headers["retry-after"] == "8"
        fake.inside(lambda: setattr(fake.engine, "held", False))
        told = b""
        while not told.endswith(b"\r\n0\r\n\r\n"):
            told += running.recv(1 << 16)
        assert b"data: [DONE]" in told


def test_all_choices_are_taken_or_none(fake: Served) -> None:  # case 64
    fake.engine.held, fake.engine.slots = True, 3
    refused(fake.client.post("/v1/completions", json={"prompt": "a", "n": 4}), 429)
    fake.until(lambda: not fake.engine.open)
    assert sorted(fake.engine.aborted) == [0, 1, 2]


def test_a_silent_stream_is_kept_alive_by_comments() -> None:  # case 62
    engine = FakeEngine()
    engine.held = True
    with (
        Served(engine, ping_s=0.05) as served,
        served.client.stream("POST", "/v1/completions", json=STREAM) as response,
    ):
        text = ""
        for piece in response.iter_text():
            text += piece
            if text.count(": ping\n\n") == 3:
                served.inside(lambda: setattr(engine, "held", False))
        assert text.count(": ping\n\n") >= 3
        assert text.endswith("data: [DONE]\n\n")


def test_a_client_that_does_not_read_is_dropped() -> None:
    engine = FakeEngine("word " * 400_000)
    engine.max_len = 1 << 22
    engine.tokenizer.encode = lambda text, **_: [50] * (len(text) // 5 if "word" in text else 1)  # type: ignore[method-assign]
    with Served(engine, write_timeout_s=0.2) as served:
        with sent(served, {"prompt": "a", "stream": True, "max_tokens": 1 << 21}):
            served.until(lambda: len(engine.asked) == 1)
            served.until(lambda: served.front.places == 0)
        assert engine.aborted == [0]


def test_headers_that_trickle_in_or_are_too_large_close_the_connection() -> None:  # case 11
    with Served(FakeEngine(), header_timeout_s=0.2) as served:
        port = httpx.URL(served.url).port
        with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
            slow.sendall(b"GET /health HTTP/1.1\r\nx-a: b")
            assert served.client.get("/health").status_code == 200
            assert slow.recv(100) == b""
        with socket.create_connection(("127.0.0.1", port), timeout=10) as large:
            large.sendall(b"GET /health HTTP/1.1\r\nx-a: " + b"b" * (80 << 10))
            assert large.recv(100).startswith(b"HTTP/1.1 400")


def test_a_body_that_trickles_in_is_refused() -> None:
    with (
        Served(FakeEngine(), body_timeout_s=0.1) as served,
        socket.create_connection(("127.0.0.1", httpx.URL(served.url).port), timeout=10) as slow,
    ):
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{")
        assert slow.recv(100).startswith(b"HTTP/1.1 408")


def test_more_requests_than_are_allowed_at_once_are_refused() -> None:
    engine = FakeEngine()
    engine.held = True
    with Served(engine, max_concurrency=1) as served, sent(served, STREAM):
        served.until(lambda: len(engine.open) == 1)
        response = served.client.post("/v1/completions", json={"prompt": "a"})
        assert refused(response, 503)["code"] == "too_many_requests"
        assert response.headers["retry-after"] == "1"
        assert served.client.get("/health").status_code == 200
        engine.held = False


def test_bodies_have_room_together_and_give_it_back() -> None:
    engine, long = FakeEngine(), {"prompt": "a", "user": "b" * 600}
    engine.held = True
    with Served(engine, max_body_bytes=1000, max_bodies_bytes=1000) as served:
        with sent(served, {**STREAM, **long}):
            served.until(lambda: len(engine.open) == 1)
            response = served.client.post("/v1/completions", json=long)
            assert refused(response, 503)["code"] == "too_many_requests"
            engine.held = False
        served.until(lambda: served.front.places == 0)
        assert served.client.post("/v1/completions", json=long).status_code == 200


def test_a_response_that_cannot_begin_lets_its_requests_go() -> None:
    left: list[str] = []

    async def never() -> AsyncGenerator[bytes, None]:
        yield b""

    async def broken(_: object) -> None:
        raise OSError("no socket")

    async def silent() -> Message:
        return await asyncio.Future()

    response = EventStream(never(), lambda: left.append("left"), 15.0, {})
    with pytest.raises(OSError, match="no socket"):
        asyncio.run(response({"type": "http", "path": "/"}, silent, broken))
    assert left == ["left"]


def test_a_drain_that_begins_meanwhile_is_a_503(fake: Served, monkeypatch: pytest.MonkeyPatch) -> None:  # case 105
    def late(*_: object, **__: object) -> None:
        fake.engine.status = "draining"
        raise EngineError("the engine is draining and takes no requests")

    monkeypatch.setattr(fake.engine, "submit", late)
    try:
        assert refused(fake.client.post("/v1/completions", json={"prompt": "a"}), 503)["code"] == "draining"
    finally:
        monkeypatch.undo()
        fake.engine.status = "ready"
