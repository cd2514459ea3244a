"""From a command's settings to a model that decodes, and from its words to a prompt."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from dlx.cli.flags import Asked
from dlx.doctor import settle
from dlx.errors import RequestError

if TYPE_CHECKING:
    from dlx.llm import LLM


def load(found: Asked, **more: Any) -> LLM:
    """The model as the settings and `more` describe it."""
    from dlx.live import waiting

    with waiting("loading the model"):
        settle(found.engine.device)

        from dlx.llm import LLM

        return found.told(lambda: LLM(**found.engine.given() | more))


def prompted(prompt: str) -> str:
    """The prompt, from stdin for -, if it says something in valid Unicode."""
    return checked(sys.stdin.read() if prompt == "-" else prompt)


def checked(prompt: str) -> str:
    """The prompt, if it says something in valid Unicode."""
    if not prompt.strip():
        raise RequestError("the prompt is empty; give some text, or - to read it from stdin")
    return encoded(prompt)


def encoded(text: str) -> str:
    """The text, if it is valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt is not valid UTF-8 at character {error.start}; convert it") from error
    return text
