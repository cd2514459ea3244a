"""Flags made of settings: a command takes the sections that it names, and nothing is written twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, make_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar, Union, get_args, get_origin

from cyclopts import Group, Parameter, Token

from dlx.environment import environment
from dlx.errors import ConfigError
from dlx.request import SamplingParams
from dlx.serve.options import Options
from dlx.settings import Settings
from dlx.sources import Knob, Section, Values, build, check_variables, document, merged, with_sources

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


def integer(_: object, tokens: Sequence[Token]) -> int:
    """An integer of a command line; 1.5 is refused."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"{tokens[0].value!r} is not an integer") from None


Whole = Annotated[int, Parameter(converter=integer)]

ENGINE = Section("engine", Settings, Settings.check)
SAMPLING = Section("sampling", SamplingParams, SamplingParams.check)
SERVE = Section("serve", Options, Options.check)
SECTIONS = (ENGINE, SAMPLING, SERVE)  # of a file and of the environment; keys outside of any are the first one's

LAST = {"engine": 2, "sampling": 3}  # of the panels of --help


@dataclass(frozen=True)
class Given:
    """The flags of a section that a command line names; subclasses are made by `flags`, for cyclopts reads classes."""

    mappings: ClassVar[frozenset[str]] = frozenset()  # fields that are given as NAME=VALUE, again and again

    def values(self) -> dict[str, Any]:
        found = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return found | {name: dict(map(pair, found[name])) for name in self.mappings & set(found)}


@dataclass(frozen=True)
class More(Given):
    """Flags put together by a command."""

    found: Mapping[str, Any]

    def values(self) -> dict[str, Any]:
        return dict(self.found)


def pair(text: str) -> tuple[str, str]:
    """NAME=VALUE in two."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ConfigError(f"{text!r} is not allowed; write NAME=VALUE")
    return name, value


NONE = Given()


@Parameter(name="*")
@dataclass(frozen=True)
class Call:
    """What every command that reads settings takes."""

    config: Annotated[Path | None, Parameter(help="YAML file of settings; else $DLX_CONFIG.")] = None
    debug: Annotated[bool, Parameter(help="Log everything, and show tracebacks.")] = False


PLAIN = Call()


class Asked(NamedTuple):
    """The settings of a command, checked; and, section by section, each value with its source."""

    engine: Settings
    sampling: SamplingParams
    server: Options
    values: dict[str, Values]

    @property
    def key(self) -> str | None:
        """The key of a server, as a client sends it."""
        return self.server.key

    def told(self, call: Callable[[], T]) -> T:
        """What a call returns; an error about a setting begins with where that setting stands."""
        return with_sources(call, {n: v for name in ("serve", "engine") for n, v in self.values[name].items()})


def asked(
    call: Call, engine: Given = NONE, sampling: Given = NONE, weak: Mapping[str, Any] | None = None,
    server: Given = NONE,
) -> Asked:  # fmt: skip
    """Flags, variables and the file, put together and checked; `weak` are a command's own defaults of the engine.

    Raises ConfigError or RequestError
    """
    check_variables(SECTIONS)
    file = document(call.config or environment().config, SECTIONS)
    values = {
        "engine": merged(ENGINE, engine.values(), file["engine"], weak),
        "sampling": merged(SAMPLING, sampling.values(), file["sampling"]),
        "serve": merged(SERVE, server.values(), file["serve"]),
    }
    return Asked(
        build(ENGINE, values["engine"]), build(SAMPLING, values["sampling"]), build(SERVE, values["serve"]), values
    )


def chosen(engine: Given, model: Path | None, **more: Any) -> Given:
    """The flags with the model that stands alone, and with `more` where that is not None. Raises ConfigError."""
    found = engine.values()
    if model is not None and found.get("model") is not None:
        raise ConfigError(f"two models: {model}, and --model {found['model']}; name one")
    return More(found | {name: v for name, v in {"model": model, **more}.items() if v is not None})


def taking(**sections: type[Given]) -> Callable[[F], F]:
    """Give the parameters of a command, which are declared as `Given`, the flags that cyclopts is to read."""

    def change(command: F) -> F:
        command.__annotations__ |= {name: Annotated[made, Parameter(name="*")] for name, made in sections.items()}
        command.__kwdefaults__ = (command.__kwdefaults__ or {}) | {name: made() for name, made in sections.items()}
        return command

    return change


@cache
def flags(section: Section, only: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> type[Given]:
    """A class with a field a setting: None where it is not given."""
    group = Group(f"{section.name.capitalize()} settings", sort_key=LAST.get(section.name, 1))
    chosen = [k for k in section.knobs.values() if (not only or k.name in only) and k.name not in without]
    mappings = frozenset(k.name for k in chosen if get_origin(plain(k.kind)) is dict)
    return make_dataclass(
        f"{section.name.capitalize()}Flags", [(k.name, annotated(k, group), None) for k in chosen],
        bases=(Given,), frozen=True,
        namespace={"__module__": __name__, "mappings": mappings},  # without a module cyclopts takes it for a builtin
    )  # fmt: skip


def annotated(knob: Knob, group: Group) -> Any:
    """How cyclopts reads a setting."""
    kind = plain(knob.kind)
    negative = f"--no-{knob.flag[2:]}" if kind is bool else ()
    if get_origin(kind) is dict:
        kind = list[Annotated[str, Parameter(metavar="NAME=VALUE")]]
    shown = "" if knob.default in (None, (), {}, "") else str(knob.default)
    how = Parameter(name=knob.flag, help=knob.sentence, group=group, negative=negative, show_default=shown or False)
    return Annotated[(Whole if kind is int else kind) | None, how]


def plain(kind: Any) -> Any:
    """A kind without None and constraints."""
    if get_origin(kind) is Annotated:
        return plain(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        (one,) = [part for part in get_args(kind) if part is not type(None)]
        return plain(one)
    return kind if get_origin(kind) is not None or kind in (bool, int, float, str, Path) else str  # str: a secret
