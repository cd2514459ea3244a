"""Who may pass: key, readiness, places and body of a request, before any route sees it. Pure ASGI."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dlx.serve.faults import Fault, fault_of
from dlx.serve.metrics import Metrics
from dlx.serve.options import Options

if TYPE_CHECKING:
    from dlx.async_engine import AsyncEngine

log = logging.getLogger(__name__)

PUBLIC = ("/health", "/ready")
RETRY_S = 5.0  # when to come again while the server starts or drains


class Gone(Exception):
    """The client went away."""


class Admission:
    """An ASGI application around another: a request that may not pass is answered here, in OpenAI's envelope.

    inside  requests in progress
    held    bytes of their bodies
    """

    def __init__(self, app: ASGIApp, engine: AsyncEngine, options: Options, metrics: Metrics) -> None:
        self._app, self._engine, self._options, self._metrics = app, engine, options, metrics
        self._key = None if options.key is None else _digest(options.key.encode())
        self.inside, self.held = 0, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        id, begun = _id(scope), False

        async def named(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                MutableHeaders(scope=message)["x-request-id"] = id
            await send(message)

        try:
            self._unlock(scope)
            if scope["method"] != "POST":  # no other route takes a body, so none is read
                await self._app(scope, receive, named)
                return
            with self._place() as hold:
                await self._app(scope, await self._read(scope, receive, hold), named)
        except Gone:
            log.info("499 %s %s: the client went away (%s)", scope["method"], _shown(scope), id)
        except Exception as error:
            if not isinstance(error, Fault):
                log.exception("%s %s failed (%s)", scope["method"], _shown(scope), id)
            if not begun:
                fault = fault_of(error)
                self._metrics.ended("rejected" if fault.status < 500 else "failed", fault.code)
                await fault.response()(scope, receive, named)

    def _unlock(self, scope: Scope) -> None:
        """Every path asks for the key, those that are not there too; a browser sends it as a password."""
        if self._key is None or scope["path"] in PUBLIC:
            return
        kind, _, given = Headers(scope=scope).get("authorization", "").encode("latin-1").partition(b" ")
        if kind.lower() == b"basic":
            given = _password(given)
        right = hmac.compare_digest(_digest(given.strip()), self._key)
        if not right or kind.lower() not in (b"bearer", b"basic"):
            raise Fault(401, "invalid_api_key", "a key is needed: send the header 'Authorization: Bearer KEY'")

    @contextmanager
    def _place(self) -> Iterator[Callable[[int], None]]:
        """A place among those that may be in progress, and room for a body; work is taken while the engine is ready."""
        status = self._engine.health().status
        if status != "ready":
            raise Fault(503, status, f"the server is {status}; come again", retry_after_s=RETRY_S)
        if self.inside >= self._options.max_concurrency:
            raise Fault(503, "too_many_requests", f"{self.inside} requests are in progress", retry_after_s=1.0)
        own = 0

        def hold(size: int) -> None:
            nonlocal own
            if self.held + size > self._options.max_bodies_bytes:
                raise Fault(503, "too_many_requests", "bodies of others take the room that is left", retry_after_s=1.0)
            own, self.held = own + size, self.held + size

        self.inside += 1
        self._metrics.http.set(self.inside)
        try:
            yield hold
        finally:
            self.inside, self.held = self.inside - 1, self.held - own
            self._metrics.http.set(self.inside)

    async def _read(self, scope: Scope, receive: Receive, hold: Callable[[int], None]) -> Receive:
        """The body in one piece, never more of it than is allowed. Raises Fault 408, 413, 415, or as `hold`."""
        headers, most = Headers(scope=scope), self._options.max_body_bytes
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length[:20]) > most:
            raise _large(most)
        body = bytearray()
        try:
            async with asyncio.timeout(self._options.body_timeout_s):
                while (message := await receive())["type"] == "http.request":
                    piece = message.get("body", b"")
                    if len(body) + len(piece) > most:
                        raise _large(most)
                    hold(len(piece))
                    body += piece
                    if not message.get("more_body", False):
                        break
                else:
                    raise Gone
        except TimeoutError:
            raise Fault(408, "body_timeout", "the body took too long to arrive") from None
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if body and kind != "application/json":  # a page of another origin cannot send this type unasked
            raise Fault(415, "unsupported_media_type", "send the body with 'Content-Type: application/json'")
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def again() -> Message:
            return whole.pop() if whole else await receive()

        return again


def _large(most: int) -> Fault:
    return Fault(413, "body_too_large", f"the body has more than the {most} bytes that are allowed")


def _digest(text: bytes) -> bytes:
    """Keys are compared by digests of one length."""
    return hashlib.sha256(text).digest()


def _password(given: bytes) -> bytes:
    """Of `name:password` in base64."""
    try:
        return base64.b64decode(given, validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return b""


def _id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if re.fullmatch(r"[A-Za-z0-9_.:-]{1,128}", given) else secrets.token_hex(8)


def _shown(scope: Scope) -> str:
    return ascii(scope["path"][:100])
