"""How the server listens, whom it lets in, and how much it takes on. Free of the server's libraries."""

from __future__ import annotations

import ipaddress
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from dlx.errors import ConfigError

Count = Annotated[int, Field(strict=True, ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Options(BaseModel):
    """Options of `dlx serve`; those of the engine are `dlx.config.Config`."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    host: str = Field(default="127.0.0.1", description="Address to listen at; one that others reach needs api_key.")
    port: int = Field(default=8000, strict=True, ge=0, le=65535, description="Port to listen at; 0 takes a free one.")
    api_key: SecretStr | None = Field(default=None, description="Key that every route but /health and /ready asks for.")
    no_auth: bool = Field(default=False, description="Let others reach the server without a key.")
    served_model_name: tuple[str, ...] = Field(default=(), description="Names of the model; else its folder's.")
    max_body_bytes: Count = Field(default=4 << 20, description="Bytes of a request's body at most.")
    max_bodies_bytes: Count = Field(default=256 << 20, description="Bytes of all bodies in progress at most.")
    max_concurrency: Count = Field(default=1024, description="Requests in progress at most.")
    max_n: Count = Field(default=8, description="Choices (n) a prompt at most.")
    max_prompts: Count = Field(default=64, description="Prompts a completion request at most.")
    default_max_tokens: Count = Field(default=1024, description="max_tokens of a request that names none.")
    max_queued: Count = Field(default=256, description="Requests that wait at most; more get 429.")
    max_queued_tokens: Count | None = Field(default=None, description="Tokens that wait at most; else 8 x the K/V's.")
    timeout_s: Seconds = Field(default=600.0, description="Seconds a request may take in all.")
    queue_timeout_s: Seconds = Field(default=600.0, description="Seconds a request may wait to be admitted.")
    watchdog_s: Seconds = Field(default=60.0, description="Seconds a step may take before the engine is unhealthy.")
    unhealthy_exit_s: Seconds = Field(
        default=30.0, description="Seconds that an unhealthy server answers 503, then exits."
    )
    drain_s: Seconds = Field(default=30.0, description="Seconds that running requests get after SIGTERM.")
    header_timeout_s: Seconds = Field(default=20.0, description="Seconds for a request's line and headers to arrive.")
    body_timeout_s: Seconds = Field(default=30.0, description="Seconds for a request's body to arrive.")
    write_timeout_s: Seconds = Field(default=30.0, description="Seconds that a client may refuse to read.")
    ping_s: Seconds = Field(default=15.0, description="Seconds of silence on a stream after which a comment is sent.")
    strict_requests: bool = Field(default=False, description="Refuse unknown request fields instead of ignoring them.")

    def check(self) -> None:
        """Raise ConfigError for a server that strangers could use by accident, or for limits at odds."""
        if self.key == "":
            raise ConfigError("api_key is empty; give a key, or leave it out")
        if self.max_bodies_bytes < self.max_body_bytes:
            raise ConfigError(
                f"max_bodies_bytes={self.max_bodies_bytes} has no room for one body of {self.max_body_bytes} bytes; "
                "raise it, or lower max_body_bytes"
            )
        if self.api_key is None and not self.no_auth and not self._loopback:
            raise ConfigError(
                f"host={self.host!r} can be reached by others and there is no key; set api_key (DLX_API_KEY), use "
                "host='127.0.0.1', or pass no_auth to serve everyone"
            )

    @property
    def key(self) -> str | None:
        """The key as it is sent: a line end, which secrets in files and variables often have, is no part of it."""
        return None if self.api_key is None else self.api_key.get_secret_value().strip()

    @property
    def _loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
