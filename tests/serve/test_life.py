"""A server's life: it answers while it loads, drains on a signal, outlives a step that raises, not one that hangs.

Each case bears the number that it has in docs/faults.md.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from dlx.async_engine import AsyncEngine
from dlx.config import Config
from dlx.errors import ModelError
from dlx.health import Limits
from dlx.serve.options import Options
from dlx.serve.run import bound, serve
from tests.serve.fake import ANSWER, FakeEngine
from tests.serve.served import Served
from tests.serve.test_bodies import HELLO, refused
from tests.serve.test_streams import STREAM, events, sent


def all_of(peer: socket.socket) -> str:
    """What a connection says until it is closed."""
    return b"".join(iter(lambda: peer.recv(1 << 16), b"")).decode()


def test_requests_are_put_off_while_the_model_loads() -> None:  # case 105
    engine, loaded = FakeEngine(), threading.Event()

    async def loading() -> None:
        await asyncio.get_running_loop().run_in_executor(None, loaded.wait)

    engine.loading = loading
    served = Served(engine)
    try:
        served.begin()
        with httpx.Client(base_url=served.url, timeout=10) as client:
            for path in ("/v1/completions", "/v1/tokenize"):
                response = client.post(path, json={"prompt": "a"})
                assert refused(response, 503)["code"] == "starting"
                assert response.headers["retry-after"] == "5"
            assert (client.get("/health").status_code, client.get("/ready").status_code) == (200, 503)
            assert client.get("/metrics").status_code == client.get("/v1/models").status_code == 200
            loaded.set()
            served.until(lambda: engine.status == "ready")
            assert client.get("/ready").status_code == 200
            assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200
    finally:
        loaded.set()
        served.loop.call_soon_threadsafe(served.front.drain)
        served.join()
    assert served.code == 0


def test_a_drain_lets_running_requests_finish_and_refuses_new_ones() -> None:  # cases 104 and 105
    engine = FakeEngine()
    engine.held = True
    with Served(engine) as served, sent(served, STREAM) as running:
        served.until(lambda: len(engine.open) == 1)
        served.inside(served.front.drain)
        served.until(lambda: engine.status == "draining")
        response = served.client.post("/v1/completions", json={"prompt": "a"})
        assert refused(response, 503)["code"] == "draining"
        assert response.headers["retry-after"] == "5"
        assert (served.client.get("/health").status_code, served.client.get("/ready").status_code) == (200, 503)
        engine.held = False
        said = all_of(running)
        served.join()
    assert said.endswith("data: [DONE]\n\n\r\n0\r\n\r\n")
    assert (served.code, engine.status, engine.aborted) == (0, "closed", [])


@pytest.mark.parametrize("again", [False, True])
def test_at_its_deadline_or_told_again_a_drain_ends_with_a_typed_end(again: bool) -> None:  # case 104
    engine = FakeEngine()
    engine.held = True
    with Served(engine, drain_s=30 if again else 0.2) as served, sent(served, STREAM) as running:
        served.until(lambda: len(engine.open) == 1)
        served.inside(served.front.drain)
        if again:
            served.until(lambda: engine.status == "draining")
            served.inside(served.front.drain)
        said = all_of(running)
        served.join()
    assert '"finish_reason":"abort"' in said and '"finish_detail":"abort"' in said
    assert served.code == 0


def test_a_port_that_is_taken_ends_it_before_the_model_is_looked_at() -> None:  # case 106
    with bound(Options(port=0)) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert serve(Config.from_args("/nowhere/at/all", device="cpu"), Options(port=port)) == 1


def test_an_address_of_another_machine_ends_it_too() -> None:  # case 106
    options = Options(host="192.0.2.1", port=0, no_auth=True)
    assert serve(Config.from_args("/nowhere/at/all", device="cpu"), options) == 1


def test_a_model_that_cannot_be_loaded_is_raised_and_the_port_is_free_again(tmp_path: Path) -> None:
    served = Served(AsyncEngine(Config.from_args(tmp_path, graphs="off", device="cpu")))
    served.begin()
    served.join()
    assert isinstance(served.error, ModelError)
    port = httpx.URL(served.url).port
    assert port is not None
    bound(Options(port=port)).close()


def test_a_server_touches_no_signals() -> None:  # case 108
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with Served(FakeEngine()) as served:
        assert served.client.post("/v1/completions", json={"prompt": "a"}).json()["choices"][0]["text"] == ANSWER
        assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.fixture
def real(nano: Path) -> Iterator[Served]:
    """A server over the nano model whose steps may take half a second."""
    config = Config.from_args(nano, graphs="off", device="cpu", max_num_seqs=2)
    with Served(AsyncEngine(config, Limits(watchdog_s=1.0)), unhealthy_exit_s=0.5) as served:
        yield served


@pytest.mark.parametrize("streamed", [False, True])
def test_a_step_that_raises_fails_its_requests_alone(real: Served, streamed: bool) -> None:  # case 101
    worker = real.inside(lambda: real.engine.engine.worker)
    launch = worker.launch

    def fail(plan: Any) -> None:
        worker.launch = launch
        raise RuntimeError("boom")

    worker.launch = fail
    response = real.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 8, "stream": streamed})
    if streamed:
        *_, kind, error = events(response.text)
        assert kind == "event: error"
    else:
        assert response.status_code == 500
        error = response.text
    assert json.loads(error)["error"]["message"] == "RuntimeError: boom"
    assert real.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 8}).status_code == 200
    assert real.client.get("/health").status_code == 200


def test_a_step_that_hangs_makes_it_unhealthy_and_then_ends_it(real: Served) -> None:  # case 74
    worker, go = real.inside(lambda: real.engine.engine.worker), threading.Event()
    worker.launch = lambda plan: go.wait(60)
    try:
        error = refused(real.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 8}), 500)
        assert "watchdog" in error["message"]
        response = real.client.get("/health")
        assert (response.status_code, response.json()["status"]) == (503, "unhealthy")
        assert refused(real.client.post("/v1/completions", json={"prompt": "a"}), 503)["code"] == "unhealthy"
        real.join()
    finally:
        go.set()
    assert real.code == 1


PROGRAM = """
import sys
from dlx.config import Config
from dlx.serve.options import Options
from dlx.serve.run import serve
told = lambda text: print(text, flush=True)
config = Config.from_args(sys.argv[1], graphs="off", device="cpu")
sys.exit(serve(config, Options(port=0, drain_s=float(sys.argv[2])), told))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signals", "drain_s", "code"),
    [([signal.SIGTERM], 0.5, 0), ([signal.SIGTERM, signal.SIGTERM], 60, 0), ([signal.SIGINT], 0.5, 130)],
    ids=["SIGTERM", "SIGTERM twice", "SIGINT"],
)
def test_a_signal_ends_the_process_with_its_code(nano: Path, signals: list[int], drain_s: float, code: int) -> None:
    """Case 104: under load, and nothing is left of it."""
    command = [sys.executable, "-c", PROGRAM, str(nano), str(drain_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().split()[2].rstrip(";")
            assert process.stdout.readline() == "ready\n"
            own = {"ignore_eos": True, "threshold": 1.0}
            asked = {"messages": HELLO, "stream": True, "max_tokens": 2000, "dlx": own, "n": 4}
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=asked, timeout=60) as response:
                pieces = response.iter_text()
                said = next(pieces)
                for number in signals:
                    process.send_signal(number)
                    if len(signals) > 1:  # two at once would be one
                        process.stdout.readline()
                said += "".join(pieces)
            children = psutil.Process().children(recursive=True)
            assert [child.pid for child in children if child.ppid() == process.pid] == []
            assert process.wait(30) == code
        finally:
            process.kill()
    assert said.count('"finish_reason":"abort"') == 4
    assert "[DONE]" in said
