"""What an evaluation is told, by the command line, a run file, or a caller in Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dlx.errors import ConfigError

# fields that stand for themselves on a command line
OWN = ("tasks", "limit", "data", "chat", "out", "save_results", "include_path", "confirm_run_unsafe_code")


class Options(BaseModel):
    """One evaluation. `options` checks what is given and tells what is wrong in dlx's words.

    Any: `llm` and `params` hold what LLM and SamplingParams take, and those check it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    tasks: tuple[str, ...] = Field(
        default=("tiny",),
        min_length=1,
        description="tiny (the bundled model's eleven), tiny_NAME, gsm8k and humaneval (of `data`), or lm-eval's.",
    )
    limit: int | None = Field(default=None, ge=1, strict=True, description="Prompts a task; else all, 100 of tiny.")
    data: dict[str, Path] = Field(default={}, description="Task → file as it is published: gsm8k=test.jsonl.")
    chat: bool | None = Field(default=None, description="Ask through the chat template; else if the model has one.")
    out: Path | None = Field(default=None, description="Folder of results.json.")
    save_results: bool = Field(default=False, description="Write each answer with its figures to samples.jsonl.")
    include_path: Path | None = Field(default=None, description="Folder of lm-eval's task files; their code runs.")
    confirm_run_unsafe_code: bool = Field(default=False, description="Run the programs that the model writes.")
    llm: dict[str, Any] = Field(default={}, description="Arguments of LLM.")
    params: dict[str, Any] = Field(default={}, description="Arguments of SamplingParams that go before the tasks' own.")
    family: tuple[str, ...] = Field(default=(), description="Families that the checkpoint must be of; none: any.")
    mask_id: int | None = Field(default=None, description="Mask id that the checkpoint must have; none: any.")


def options(**given: Any) -> Options:
    """Checked options. Raises ConfigError  for an unknown name or a value that is not allowed."""
    try:
        return Options(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        allowed = first["msg"] if first["type"] != "extra_forbidden" else f"use {', '.join(Options.model_fields)}"
        raise ConfigError(f"{name}={first['input']!r} is not allowed: {allowed}") from None
