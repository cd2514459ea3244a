"""The key: every route asks for it but two, in constant time, and a public address is not served without one."""

from __future__ import annotations

import base64
import hmac
from collections.abc import Iterator

import pytest

from dlx.errors import ConfigError
from dlx.serve.options import Options
from tests.serve.fake import FakeEngine
from tests.serve.served import Served
from tests.serve.test_bodies import refused

KEY = "sésame-0123456789"


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    with Served(FakeEngine(), api_key=KEY) as served:
        yield served


def test_only_health_and_readiness_are_public(locked: Served) -> None:  # case 10
    key = {"authorization": f"Bearer {KEY}".encode()}
    paths = locked.client.get("/openapi.json", headers=key).json()["paths"]
    routes = [(method, path) for path, methods in paths.items() for method in methods]
    assert len(routes) >= 9
    more = [("get", path) for path in ("/", "/openapi.json", "/docs", "/nothing", "/page/x.js", "/health/", "//health")]
    for method, path in [*routes, *more]:
        response = locked.client.request(method.upper(), locked.url + path.format(name="nano"))
        if path in ("/health", "/ready"):
            assert response.status_code == 200
        else:
            assert refused(response, 401)["code"] == "invalid_api_key", path
            assert response.headers["www-authenticate"].startswith("Basic")


WRONG = {
    "none": {},
    "empty": {"authorization": "Bearer"},
    "wrong": {"authorization": "Bearer wrong"},
    "longer": {"authorization": f"Bearer {KEY}x".encode()},
    "without its kind": {"authorization": KEY.encode()},
    "another kind": {"authorization": f"Digest {KEY}".encode()},
    "broken basic": {"authorization": "Basic !!!"},
    "wrong basic": {"authorization": "Basic " + base64.b64encode(b"me:wrong").decode()},
    "as the name of basic": {"authorization": "Basic " + base64.b64encode(f"{KEY}:".encode()).decode()},
    "another header": {"x-api-key": KEY.encode()},
}


@pytest.mark.parametrize("headers", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_key_is_refused(locked: Served, headers: dict[str, str]) -> None:  # case 9
    refused(locked.client.post("/v1/completions", json={"prompt": "a"}, headers=headers), 401)
    assert locked.engine.asked == []


def test_a_key_in_the_address_does_not_count(locked: Served) -> None:  # case 9
    refused(locked.client.get("/v1/models", params={"api_key": KEY, "key": KEY}), 401)


def test_the_key_lets_in_as_a_bearer_s_and_as_a_browser_s_password(locked: Served) -> None:
    basic = base64.b64encode(f"anyone:{KEY}".encode()).decode()
    for value in (f"Bearer {KEY}".encode(), f"bearer {KEY}".encode(), f"Basic {basic}".encode()):
        assert locked.client.get("/v1/models", headers={"authorization": value}).status_code == 200


def test_keys_are_compared_in_constant_time(locked: Served, monkeypatch: pytest.MonkeyPatch) -> None:  # case 9
    compared: list[tuple[int, int]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return False

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for headers in WRONG.values():
        locked.client.get("/v1/models", headers=headers)
    assert compared == [(32, 32)] * len(WRONG)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_an_address_of_others_needs_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match="there is no key"):
        Options(host=host).check()
    Options(host=host, api_key="k").check()
    Options(host=host, no_auth=True).check()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    Options(host=host).check()


def test_bodies_need_room_for_one() -> None:
    with pytest.raises(ConfigError, match="max_bodies_bytes=10 has no room for one body of 20 bytes"):
        Options(max_body_bytes=20, max_bodies_bytes=10).check()


def test_an_empty_key_is_no_key() -> None:
    for key in ("", "\n"):
        with pytest.raises(ConfigError, match="api_key is empty"):
            Options(api_key=key).check()


def test_a_line_end_behind_a_key_is_no_part_of_it() -> None:
    with Served(FakeEngine(), api_key=f"{KEY}\n") as served:
        assert served.client.get("/v1/models", headers={"authorization": f"Bearer {KEY}".encode()}).status_code == 200


def test_a_key_is_not_shown() -> None:
    assert KEY not in repr(Options(api_key=KEY)) + str(Options(api_key=KEY))
