"""Commands about the installation: what the machine offers, what is set, shells, versions."""

from __future__ import annotations

import json as encoding
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

import dlx
from dlx.cli.flags import ENGINE, NONE, PLAIN, SECTIONS, Call, Given, asked, flags, taking
from dlx.cli.notices import set_logging
from dlx.doctor import examine, installed
from dlx.sources import Section, Values

Json = Annotated[bool, Parameter(help="Print one JSON object.")]


def doctor(*, json: Json = False) -> int:
    """Print versions, devices, compilers, and what would be captured for the bundled model."""
    from dlx.live import dumps, in_words

    report, code = examine()
    width = max(map(len, report))
    print(dumps(report) if json else "\n".join(f"{k:<{width}}  {in_words(v)}" for k, v in report.items()))
    return code


def version(*, json: Json = False) -> None:
    """Print the versions of dlx, torch, triton and transformers."""
    found = {"dlx": dlx.__version__} | {name: installed(name) for name in ("torch", "triton", "transformers")}
    print(encoding.dumps(found) if json else "\n".join(f"{name} {one or 'none'}" for name, one in found.items()))


config = App(name="config", help="Show, check or describe the settings.")


@config.command
@taking(engine=flags(ENGINE))
def show(*, json: Json = False, engine: Given = NONE, call: Call = PLAIN) -> None:
    """Print every setting, its value, and where it stands: a flag, a variable, the file, or by default."""
    set_logging(call.debug)
    found = asked(call, engine)
    lines = [line for section in SECTIONS for line in listed(section, found.values.get(section.name, {}))]
    if json:
        print(
            encoding.dumps({f"{s}.{name}": {"value": v, "source": where} for s, name, v, where in lines}, default=str)
        )
        return
    cells = [(f"{s}.{name}", encoding.dumps(v, default=str, ensure_ascii=False), where) for s, name, v, where in lines]
    wide = [max(len(cell[i]) for cell in cells) for i in (0, 1)]
    print("\n".join(f"{name:<{wide[0]}}  {value:<{wide[1]}}  {where}" for name, value, where in cells))


def listed(section: Section, values: Values) -> list[tuple[str, str, Any, str]]:
    """Section, field, value and source of every setting; secrets are hidden."""
    lines = []
    for knob in section.knobs.values():
        value, where = values.get(knob.name, (knob.default, "default"))
        lines.append((section.name, knob.name, "…" if knob.secret and value is not None else value, where))
    return lines


@config.command
@taking(engine=flags(ENGINE))
def check(
    file: Annotated[Path | None, Parameter(help="The same as --config.")] = None,
    /,
    *,
    json: Json = False,
    engine: Given = NONE,
    call: Call = PLAIN,
) -> None:
    """Check settings against each other, this machine and the model's config.json; nothing is loaded."""
    set_logging(call.debug)
    found = asked(call if file is None else Call(file, call.debug), engine)
    from dlx.config import Config, bind, geometry
    from dlx.models.card import Card
    from dlx.weights import read_config

    made = found.told(lambda: Config.from_args(**found.engine.given()).local())
    card = Card.from_hf(*read_config(made.model))
    length = found.told(lambda: bind(made.policy, card, made.block_length)).L or card.blocks[0]
    sizes = found.told(lambda: geometry(made, card, length))
    said = {"family": card.family, "device": made.device, "block": length, "page": sizes.S, "row": sizes.max_len}
    text = f"fine: {card.family} on {made.device}, blocks of {length}, pages of {sizes.S}, {sizes.max_len} tokens a row"
    print(encoding.dumps(said) if json else text)


@config.command
def schema() -> None:
    """Print the JSON schema of the settings, for an editor or a checker of YAML files."""
    from pydantic import TypeAdapter

    parts = {section.name: TypeAdapter(section.model).json_schema() for section in SECTIONS}
    top = parts[SECTIONS[0].name]
    definitions = {name: one for part in parts.values() for name, one in part.pop("$defs", {}).items()}
    whole = top | {"title": "dlx", "properties": top["properties"] | parts, "$defs": definitions}
    print(encoding.dumps(whole, indent=1, ensure_ascii=False))


def completion(shell: Annotated[Literal["bash", "zsh", "fish"], Parameter(help="Which shell.")], /) -> None:
    """Print a script that completes commands and flags: `source <(dlx completion bash)`."""
    from dlx.cli import app

    print(app.generate_completion(prog_name="dlx", shell=shell))
