"""The command that serves a model over HTTP."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dlx.cli.flags import ENGINE, NONE, PLAIN, SERVE, Call, Given, asked, chosen, flags, taking
from dlx.cli.notices import log, notice, set_logging
from dlx.doctor import settle
from dlx.errors import ConfigError

EXTRA = ("fastapi", "uvicorn", "prometheus_client")  # what `pip install 'dlx[serve]'` brings


@taking(server=flags(SERVE), engine=flags(ENGINE))
def serve(
    model: Annotated[Path | None, Parameter(help="The same as --model.")] = None,
    /,
    *,
    server: Given = NONE,
    engine: Given = NONE,
    call: Call = PLAIN,
) -> int:
    """Serve a model over HTTP, as OpenAI's API, until a signal ends it: 0 after SIGTERM, 130 after ctrl-C."""
    set_logging(call.debug)
    found = asked(call, chosen(engine, model), server=server)
    for name in EXTRA:
        if find_spec(name) is None:
            raise ConfigError(f"dlx serve needs {name}, which is not installed; run pip install 'dlx[serve]'")
    settle(found.engine.device)

    from dlx.config import Config
    from dlx.serve.run import serve as run

    given = found.engine.given()
    if found.engine.model is None:  # the bundled one: its page shows how sure it is
        given = {"watch": True, **given}
    config = found.told(lambda: Config.from_args(**given))
    if not log.handlers:
        log.handlers = [stderr()]
    return found.told(lambda: run(config, found.server, notice))


def stderr() -> logging.Handler:
    """Warnings of a server, with their time."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    return handler
