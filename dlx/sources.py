"""Values of settings from flags, variables and a YAML file: each with where it stands, checked, and told by that.

A flag wins over a `DLX_*` variable, that over the file, that over the default. A model is a pydantic model, or a
dataclass whose docstring describes its fields in rows of `name  [type]  description`. Nothing heavy is imported here.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from pydantic import BaseModel, SecretStr, TypeAdapter, ValidationError

from dlx.environment import OWN, PREFIX, variables
from dlx.errors import ConfigError, DlxError

ROW = re.compile(r"^    (\w+)  +(?:(?:int|float|bool|str)  +)?(\S.*)$")  # of a docstring: name, maybe type, description
T = TypeVar("T")
NESTED = (dict, list, tuple)  # kinds that a variable holds as JSON


class Knob(NamedTuple):
    """One field, as it can be set."""

    name: str  # of the field, the YAML key
    written: str  # its name as a flag and a variable
    kind: Any  # annotation
    checked: Any  # the same with what is allowed
    default: Any
    description: str

    @property
    def flag(self) -> str:
        return "--" + self.written.replace("_", "-")

    @property
    def sentence(self) -> str:
        return self.description[:1].upper() + self.description[1:].rstrip(".") + "."

    @property
    def secret(self) -> bool:
        return SecretStr in (self.kind, *get_args(self.kind))


class Section(NamedTuple):
    """A model with the name of its section in a file, and what checks a built one."""

    name: str
    model: type
    check: Callable[[Any], None] = lambda made: None

    @property
    def knobs(self) -> dict[str, Knob]:
        return knobs(self.model)

    def variable(self, knob: Knob) -> str:
        return PREFIX + knob.written.upper()


class Value(NamedTuple):
    value: Any
    source: str  # --max-num-seqs, DLX_MAX_NUM_SEQS, FILE: engine.max_num_seqs, or default


Values = dict[str, Value]


@cache
def knobs(model: type) -> dict[str, Knob]:
    """The fields of a model, by name."""
    if is_dataclass(model):
        kinds, said = get_type_hints(model), rows(model.__doc__ or "")
        return {
            f.name: Knob(f.name, f.name, kinds[f.name], kinds[f.name], default(f), said[f.name]) for f in fields(model)
        }
    assert issubclass(model, BaseModel)
    found = {}
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        checked = Annotated[field.annotation, field]
        written = str(extra.get("flag", name))
        found[name] = Knob(name, written, field.annotation, checked, field.get_default(call_default_factory=True),
            field.description or "")  # fmt: skip
    return found


def default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def rows(doc: str) -> dict[str, str]:
    """Name → description of the rows of a docstring; what is indented below a row goes on with it."""
    found: dict[str, str] = {}
    name = None
    for line in doc.splitlines():
        row = ROW.match(line)
        if row is not None and row[1] != "Raises":
            name = row[1]
            found[name] = row[2]
        elif name is not None and line.startswith("        "):
            found[name] += " " + line.strip()
        else:
            name = None
    return found


def document(path: Path | None, sections: Iterable[Section]) -> dict[str, Values]:
    """Section → values of a YAML file; keys outside any section are the first one's. Raises ConfigError."""
    sections = list(sections)
    found: dict[str, Values] = {section.name: {} for section in sections}
    if path is None:
        return found

    from dlx.documents import read

    by_name = {section.name: section for section in sections}
    top = sections[0]
    for key, value in read(path).items():
        if key in by_name:
            if value is not None and not isinstance(value, dict):
                raise ConfigError(f"{path}: {key} is a {type(value).__name__}; write keys and values below it")
            pairs = [(by_name[key], f"{key}.{name}", name, one) for name, one in (value or {}).items()]
        else:
            pairs = [(top, key, key, value)]
        for section, where, name, one in pairs:
            if name not in section.knobs:
                known = [*section.knobs, *(by_name if where == key else ())]
                raise ConfigError(f"{path}: {where} is no setting{nearest(name, known)}")
            if name in found[section.name]:
                raise ConfigError(f"{path}: {name} is there twice, inside and outside of {section.name}; keep one")
            found[section.name][name] = Value(one, f"{path}: {where}")
    return found


def environment(section: Section) -> Values:
    """Values of a section's variables, read as their fields ask. Raises ConfigError."""
    there = variables()
    found = {}
    for knob in section.knobs.values():
        source = section.variable(knob)
        if source in there:
            found[knob.name] = Value(parsed(knob, there[source], source), source)
    return found


def parsed(knob: Knob, text: str, source: str) -> Any:
    """A value from text; lists and mappings are JSON."""
    try:
        if get_origin(knob.kind) in NESTED:
            return TypeAdapter(knob.checked).validate_python(json.loads(text))
        return TypeAdapter(knob.checked).validate_strings(text)
    except ValidationError as error:
        raise ConfigError(f"{source}={shown(knob, text)} is not allowed: {error.errors()[0]['msg']}") from None
    except ValueError as error:
        raise ConfigError(f"{source}={shown(knob, text)} is not allowed: not JSON, {error}") from None


def shown(knob: Knob, value: Any) -> str:
    """A value in a message; never a secret one."""
    return "…" if knob.secret and value is not None else repr(str(value) if isinstance(value, Path) else value)


def check_variables(sections: Iterable[Section]) -> None:
    """Raise ConfigError for a `DLX_*` variable that means nothing, with the nearest that does."""
    known = {*OWN, *(section.variable(knob) for section in sections for knob in section.knobs.values())}
    for name, value in variables().items():
        if name not in known:
            raise ConfigError(f"{name} is no variable of dlx; unset it{nearest(name, known)}")
        if OWN.get(name) and value not in OWN[name]:
            raise ConfigError(f"{name}={value!r} is not allowed; use {' or '.join(OWN[name])}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Which known name may be meant."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else f"; use one of {', '.join(known)}"


def merged(section: Section, flags: Mapping[str, Any], file: Values, weak: Mapping[str, Any] | None = None) -> Values:
    """A value for every field that any source sets, the strongest; `weak` are a command's own defaults."""
    given = {name: Value(value, section.knobs[name].flag) for name, value in flags.items()}
    own = {name: Value(value, "default") for name, value in (weak or {}).items()}
    return own | file | environment(section) | given


def build(section: Section, values: Values) -> Any:
    """The checked model. Raises ConfigError that names the source of a wrong value, or what the check raises."""
    if is_dataclass(section.model):
        made: Any = section.model(**{name: tupled(v.value) for name, v in values.items()})
        return with_sources(lambda: section.check(made) or made, values)
    try:
        made = TypeAdapter(section.model).validate_python({name: v.value for name, v in values.items()})
    except ValidationError as error:
        first = error.errors()[0]
        knob = section.knobs[str(first["loc"][0])]
        told = f"{values[knob.name].source}={shown(knob, first['input'])}" if knob.name in values else knob.name
        raise ConfigError(f"{told} is not allowed: {first['msg']}") from None
    return with_sources(lambda: section.check(made) or made, values)


def tupled(value: Any) -> Any:
    """Lists, which a file holds, as tuples, which a dataclass holds."""
    return tuple(map(tupled, value)) if isinstance(value, list | tuple) else value


def with_sources(call: Callable[[], T], values: Values) -> T:
    """What a call returns; an error that begins with `field=` begins with where that value stands instead."""
    try:
        return call()
    except DlxError as error:
        name, equals, rest = str(error).partition("=")
        if equals and name in values and values[name].source != "default":
            raise type(error)(f"{values[name].source}={rest}") from error
        raise
