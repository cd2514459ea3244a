"""YAML files of settings: plain data alone, small, and nothing that a reader could overlook.

Words are read as YAML 1.2 does: `off` is text, not false. A key that stands twice, a tag, an alias, or more than 1 MiB
is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from dlx.errors import ConfigError

LONGEST_BYTES = 2**20
TAG = "tag:yaml.org,2002:"
DECIMAL = r"\.[0-9]+|[0-9]+\.[0-9]*"
# kind → how it is written, and its first characters
WORDS = {
    "null": (r"~|null|Null|NULL|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    "float": (
        rf"[-+]?(?:(?:{DECIMAL})(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf|\.Inf|\.INF)|\.nan|\.NaN|\.NAN",
        "-+.0123456789",
    ),
}


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader, stricter; a subclass, for that is how PyYAML is told."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  as in the parent

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node without a tag that is no alias."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(problem=f"the tag {event.tag!r} is not allowed", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are text and stand once."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != f"{TAG}str":
                raise yaml.MarkedYAMLError(problem="a key is not text", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


for kind, (pattern, first) in WORDS.items():
    Loader.add_implicit_resolver(f"{TAG}{kind}", re.compile(f"^(?:{pattern})$"), [*first, *([""] * (kind == "null"))])


def read(path: Path) -> dict[str, Any]:
    """The mapping that a file holds. Raises ConfigError that names the file, and the line where it is wrong."""
    try:
        with path.expanduser().open("rb") as file:
            data = file.read(LONGEST_BYTES + 1)
        text = data.decode()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; name a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 at byte {error.start}; name a YAML file") from None
    if len(data) > LONGEST_BYTES:
        raise ConfigError(f"{path} has more than {LONGEST_BYTES:,} bytes; name a YAML file of settings")
    try:
        value = yaml.load(text, Loader=Loader)
    except yaml.MarkedYAMLError as error:
        at = f"line {error.problem_mark.line + 1}" if error.problem_mark else "its end"
        raise ConfigError(f"{path} is not YAML of settings at {at}: {error.problem}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path} is not YAML of settings: {str(error).splitlines()[0]}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a {type(value).__name__}; write keys and values, as `max_num_seqs: 8`")
    return value
