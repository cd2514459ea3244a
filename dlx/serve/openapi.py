"""The server's description in OpenAPI's terms."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from dlx.serve.protocol import Chat, Completion, Detokenize, Tokenize

BODIES = (Chat, Completion, Tokenize, Detokenize)
ENVELOPE = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
OTHERS = {
    "400": "the request is not allowed",
    "401": "no key, or a wrong one",
    "404": "no such route or model",
    "405": "the route has other methods",
    "408": "the body took too long",
    "413": "the body is too large",
    "415": "the body is no application/json",
    "429": "the queue is full",
    "500": "the engine failed",
    "503": "starting, draining or unhealthy",
    "504": "the request's time was over",
}
STREAMED = ("/v1/chat/completions", "/v1/completions")


def described(app: FastAPI) -> dict[str, Any]:  # Any: a document of JSON
    """The document behind /openapi.json: bodies by their models, every other answer as the envelope."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, models = models_json_schema(
            [(body, "validation") for body in BODIES], ref_template="#/components/schemas/{model}"
        )
        document["components"] = {"schemas": {**models["$defs"], "Error": ENVELOPE}}
        error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        state = {"application/json": {"schema": {"type": "object", "required": ["status", "reason"]}}}
        for route, methods in document["paths"].items():
            for method in methods.values():
                good = method["responses"]
                good.pop("422", None)
                good |= {status: {"description": what, "content": error} for status, what in OTHERS.items()}
                if route in ("/health", "/ready"):
                    good["503"]["content"] = state
                if route in STREAMED:
                    good["200"]["content"]["text/event-stream"] = {"schema": {}}  # of each event; see Encoder
                if route == "/metrics":
                    good["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
        app.openapi_schema = document
    return app.openapi_schema
