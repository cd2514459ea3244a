"""The routes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

import dlx
from dlx.config import TINY
from dlx.errors import RequestError
from dlx.serve.admission import RETRY_S, Admission
from dlx.serve.asks import Desk, name_of
from dlx.serve.calls import Choices
from dlx.serve.denoise import Denoise
from dlx.serve.faults import Fault, fault_of
from dlx.serve.metrics import Metrics
from dlx.serve.openapi import described
from dlx.serve.options import Options
from dlx.serve.protocol import Chat, Completion, Detokenize, Tokenize, parsed, warning
from dlx.serve.replies import Committed, Head, Kind, whole
from dlx.serve.stream import Encoder, EventStream

if TYPE_CHECKING:
    from dlx.async_engine import AsyncEngine
    from dlx.config import Config

PAGE = Path(__file__).parent / "page" / "index.html"
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def named(config: Config, options: Options) -> dict[str, str | None]:
    """Names that requests may use for the model → the adapter behind it."""
    own = options.served_model_name or ("tiny" if config.model == TINY else config.model.name,)
    return {**dict.fromkeys(own), **{name: name for name in config.adapters}}


def application(engine: AsyncEngine, names: Mapping[str, str | None], options: Options) -> Admission:
    """The whole server as an ASGI application over a started, or starting, engine."""
    metrics, desk, began_s = Metrics(engine), Desk(engine, options), int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        desk.close()

    # no pages of documentation: they would load scripts from elsewhere; no redirects: they would go where Host says
    app = FastAPI(
        title="dlx", version=dlx.__version__, lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.openapi = partial(described, app)  # type: ignore[method-assign]
    app.add_exception_handler(HTTPException, _unrouted)
    for kind in (Fault, RequestError, Exception):  # the last is raised on, and logged by the admission
        app.add_exception_handler(kind, partial(_refused, metrics))

    def served(model: str | None) -> tuple[str, str | None]:
        """The name that a request used for the model, and its adapter. Raises Fault 404."""
        name = next(iter(names)) if model is None else model
        if name not in names:
            text = f"there is no model {name[:100]!r}; this server has {', '.join(names)}"
            raise Fault(404, "model_not_found", text, "model")
        return name, names[name]

    def encoder_of(body: Chat | Completion, head: Head, choices: int) -> Encoder:
        apart = body.stream_options is not None and body.stream_options.include_usage
        if body.stream_mode == "committed":
            return Committed(head, apart)
        if choices > 1:
            text = f"stream_mode='denoise' tells of one choice, not of {choices}"
            raise Fault(400, "invalid_value", text, "stream_mode")
        return Denoise(head, apart, engine.tokenizer, engine.card.mask_id)

    async def complete(request: Request, kind: Kind) -> Response:
        asked = Chat if kind == "chat.completion" else Completion
        body, unknown = parsed(asked, await request.body(), options.strict_requests)
        name, adapter = served(body.model)
        call = await desk.call(body, adapter)
        head, told = Head.new(kind, name), warning(unknown)
        if not body.stream:
            if body.stream_mode != "committed":
                text = f"stream_mode={body.stream_mode!r} needs stream=true"
                raise Fault(400, "invalid_value", text, "stream_mode")
            choices = Choices(engine, call, False, metrics)
            return JSONResponse(whole(head, await choices.answers(request.receive), choices.prompts), headers=told)
        encoder = encoder_of(body, head, len(call.choices))
        choices = Choices(engine, call, encoder.watch, metrics)
        return EventStream(choices.events(encoder), choices.leave, options.ping_s, told)

    @app.post("/v1/chat/completions", openapi_extra=_body("Chat"))
    async def chat(request: Request) -> Response:
        """Answer a conversation."""
        return await complete(request, "chat.completion")

    @app.post("/v1/completions", openapi_extra=_body("Completion"))
    async def completions(request: Request) -> Response:
        """Go on from texts or token ids."""
        return await complete(request, "text_completion")

    @app.post("/v1/tokenize", openapi_extra=_body("Tokenize"))
    async def tokenize(request: Request) -> Response:
        """The ids of a text, or of a conversation in the model's template."""
        body, unknown = parsed(Tokenize, await request.body(), options.strict_requests)
        served(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise Fault(400, "invalid_value", "pass either prompt or messages", "prompt")
        ids = await desk.chat(body.messages) if body.messages is not None else await desk.text(body.prompt or "")
        reply = {"tokens": ids, "count": len(ids), "max_model_len": engine.max_len}
        return JSONResponse(reply, headers=warning(unknown))

    @app.post("/v1/detokenize", openapi_extra=_body("Detokenize"))
    async def detokenize(request: Request) -> Response:
        """The text of ids, special tokens left out."""
        body, unknown = parsed(Detokenize, await request.body(), options.strict_requests)
        served(body.model)
        return JSONResponse({"prompt": await desk.decoded(body.tokens)}, headers=warning(unknown))

    def entry(name: str) -> dict[str, object]:
        facts: dict[str, object] = {"version": dlx.__version__}
        if engine.health().status in ("ready", "draining"):
            facts |= {"family": engine.card.family, "policy": name_of(engine.policy), "block_length": engine.policy.L}
            facts |= {"blocks": engine.policy.N, "filters": engine.policy.filters, "max_model_len": engine.max_len}
        own = {"id": name, "object": "model", "created": began_s, "owned_by": "dlx", "dlx": facts}
        return own | {"max_model_len": facts.get("max_model_len"), "parent": names[name] and next(iter(names))}

    @app.get("/v1/models")
    async def models() -> Response:
        """The model, and its adapters."""
        return JSONResponse({"object": "list", "data": [entry(name) for name in names]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """One of them; a name may be ORG/NAME."""
        return JSONResponse(entry(served(name)[0]))

    @app.get("/health")
    async def health() -> Response:
        """200 while the process is of use: it starts, serves or drains; 503 once its engine is beyond help."""
        return _state(engine, engine.health().status not in ("unhealthy", "closed"))

    @app.get("/ready")
    async def ready() -> Response:
        """200 while requests are taken."""
        return _state(engine, engine.health().status == "ready")

    @app.get("/metrics")
    async def scrape() -> Response:
        """For Prometheus."""
        return PlainTextResponse(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        """The demo page; with a key, the browser asks for it as a password."""
        if not PAGE.is_file():
            raise HTTPException(404)
        headers = {
            "content-security-policy": PAGE_POLICY,
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
        }
        return HTMLResponse(PAGE.read_bytes(), headers=headers)

    return Admission(app, engine, options, metrics)


def _body(name: str) -> dict[str, object]:
    """A body in the schema: the models check it themselves, as FastAPI would read numbers out of strings."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
    return {"requestBody": {"required": True, "content": content}}


def _state(engine: AsyncEngine, good: bool) -> Response:
    status, reason = engine.health()
    later = {} if good else {"retry-after": str(int(RETRY_S))}
    return JSONResponse({"status": status, "reason": reason}, 200 if good else 503, later)


async def _unrouted(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: ("not_found", "there is no such route"), 405: ("method_not_allowed", "the route has other methods")}
    code, text = words.get(error.status_code, ("http_error", str(error.detail)))
    response = Fault(error.status_code, code, text).response()
    response.headers.update(error.headers or {})
    return response


async def _refused(metrics: Metrics, _: Request, error: Exception) -> Response:
    fault = fault_of(error)
    metrics.ended("rejected" if fault.status < 500 else "failed", fault.code)
    return fault.response()
