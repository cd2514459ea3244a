"""Write docs/configuration.md: every setting with its flag, variable, key and default, from the models themselves.

python tools/configuration.py          rewrites what stands between the marks
python tools/configuration.py --check  says whether it is stale, and exits with 1 if it is
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from dlx.cli.flags import SECTIONS
from dlx.sources import Knob, Section

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
BEGIN, END = "<!-- settings:begin, by tools/configuration.py -->\n", "<!-- settings:end -->"
TITLES = {
    "engine": "What an engine is built with: `generate`, `chat`, `serve`, `eval`, `pack`, `profile`, some in `bench`",
    "sampling": "How a request is decoded, if it does not say: `generate`, `chat`, `profile`, `eval`",
    "serve": "How the server listens and what it takes on: `serve`",
}


def table(section: Section) -> str:
    """A section's settings, one a row."""
    lines = ["| key | flag | variable | is | default | |", "|---|---|---|---|---|---|"]
    for knob in section.knobs.values():
        cells = (f"`{knob.name}`", f"`{knob.flag}`", f"`{section.variable(knob)}`", words(knob.kind), default(knob))
        lines.append("| " + " | ".join([*cells, knob.sentence.replace("|", "\\|")]) + " |")
    return "\n".join(lines) + "\n"


def words(kind: Any) -> str:
    """A kind in words."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return words(parts[0])
    if origin is Literal:
        return " ".join(f"`{one}`" for one in parts)
    if origin in (Union, UnionType):
        return words(next(part for part in parts if part is not type(None)))
    if origin is dict:
        return "NAME=VALUE …"
    if origin is tuple:
        return "list of pairs" if get_origin(parts[0]) is tuple else f"list of {words(parts[0])}s"
    return {"Path": "path", "str": "text", "int": "integer", "float": "number", "bool": "true or false",
        "SecretStr": "secret"}[kind.__name__]  # fmt: skip


def default(knob: Knob) -> str:
    if knob.default in (None, (), {}, ""):
        return ""
    if isinstance(knob.default, bool):
        return f"`{str(knob.default).lower()}`"
    return f"`{knob.default:g}`" if isinstance(knob.default, float) else f"`{knob.default}`"


def written(page: str) -> str:
    """The page with the tables of today."""
    head, rest = page.split(BEGIN)
    parts = [f"## `{s.name}`\n\n{TITLES[s.name]}.\n\n{table(s)}" for s in SECTIONS]
    return head + BEGIN + "\n" + "\n".join(parts) + "\n" + END + rest.split(END)[1]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is stale")
    args = parser.parse_args(argv)
    before = PAGE.read_text()
    after = written(before)
    if args.check:
        print("fresh" if after == before else f"{PAGE.name} is stale: run python tools/configuration.py")
        return int(after != before)
    PAGE.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
