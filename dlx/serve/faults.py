"""What goes wrong, as OpenAI's envelope: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from pydantic import ValidationError
from starlette.responses import JSONResponse

from dlx.errors import BusyError, CapacityError, DlxError, EngineError, RequestError

MESSAGE_CHARS = 2000
# parts of a place in a body that are no field: a check's name, a kind of several that are allowed
KIND = re.compile(r"function-|(constrained-)?str$|list\[")
# in what the engine says of a prompt that is too long, for which OpenAI has a code of its own
TOO_LONG = ("max_model_len=", "tokens; at most", "characters has more than")
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class Fault(Exception):
    """An answer other than 200.

    code   a word for programs: invalid_value, model_not_found, queue_full, …
    param  the field of the request that is to blame
    retry_after_s  when to come again, where that helps
    """

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param, self.retry_after_s = (
            status,
            code,
            message,
            param,
            retry_after_s,
        )

    @property
    def envelope(self) -> dict[str, dict[str, str | None]]:
        """The body."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else TYPES[400])
        message = self.message[:MESSAGE_CHARS].encode(errors="replace").decode()
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        headers = {} if self.retry_after_s is None else {"retry-after": str(max(1, math.ceil(self.retry_after_s)))}
        if self.status == 401:
            headers["www-authenticate"] = 'Basic realm="dlx", charset="UTF-8"'
        return JSONResponse(self.envelope, self.status, headers)


def fault_of(error: Exception) -> Fault:
    """The fault that an error of the engine is; one that nobody expected is a 500 that tells nothing of itself."""
    if isinstance(error, Fault):
        return error
    if isinstance(error, BusyError):
        return Fault(429, "queue_full", str(error), retry_after_s=error.retry_after_s)
    if isinstance(error, RequestError):
        long = any(sign in str(error) for sign in TOO_LONG)
        return Fault(400, "context_length_exceeded" if long else "invalid_value", str(error))
    if isinstance(error, EngineError | CapacityError):
        return Fault(500, "engine_error", str(error))
    return Fault(
        500, "engine_error" if isinstance(error, DlxError) else "internal_error", "the server failed; see its log"
    )


def invalid(error: ValidationError) -> Fault:
    """The first thing that is wrong with a body. Never what was sent: it may be long, secret or not a number."""
    first, *others = error.errors(include_url=False, include_context=False, include_input=False)
    if first["type"] == "string_type" and KIND.match(str(first["loc"][-1])):
        # no text, which is one of two kinds that are allowed: told is what is wrong with it as the other, a list
        first = next((one for one in others[:1] if one["type"] != "list_type"), first)
    where = [part for part in first["loc"] if not KIND.match(str(part))]
    if first["type"] == "json_invalid":
        return Fault(400, "invalid_json", f"the body is no JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    message = first["msg"].removeprefix("Value error, ")
    return Fault(400, "invalid_value", f"{path(where) or 'the body'}: {message}", path(where) or None)


def path(parts: Sequence[int | str]) -> str:
    """A field's place: messages[0].content"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
