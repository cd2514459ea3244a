"""Reading config.json: a key under the family's name for it, checked, or a ModelError that says what is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeGuard

from dlx.errors import ModelError

LARGEST = 2**31 - 1  # ids and positions are int32 on the device


class Fields(NamedTuple):
    """A config and what it calls a key, where that is another name; a key under its common name is found too."""

    config: Mapping[str, object]
    names: Mapping[str, str] = {}

    def name(self, key: str) -> str:
        """The name under which the key is there, or would be expected."""
        own = self.names.get(key, key)
        return key if self.config.get(own) is None and self.config.get(key) is not None else own

    def get(self, key: str) -> object:
        """The value; None where it is missing or null."""
        return self.config.get(self.name(key))

    def integer(self, key: str, low: int = 1, high: int = LARGEST, default: int | None = None) -> int:
        """An integer from low to high. Raises ModelError."""
        found = self.get(key)
        value = default if found is None else found
        if not is_integer(value, low, high):
            raise self.wrong(key, found, f"an integer from {low} to {high}")
        return value

    def number(self, key: str) -> float:
        """A number above 0. Raises ModelError."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < LARGEST:
            raise self.wrong(key, value, f"a number above 0 and below {LARGEST}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """True or false. Raises ModelError."""
        found = self.get(key)
        value = default if found is None else found
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def wrong(self, key: str, value: object, allowed: str) -> ModelError:
        """The error for a key of config.json, by the name it has there."""
        return wrong(self.name(key), value, allowed)


def is_integer(value: object, low: int, high: int) -> TypeGuard[int]:
    """An int, no bool, from low to high."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def wrong(key: str, value: object, allowed: str, file: str = "config.json") -> ModelError:
    """The error that names the file, the key with its value, and what is allowed."""
    what = f"{key} is missing" if value is None else f"{key}={value!r} is not allowed"
    return ModelError(f"{file}: {what}; expected {allowed}")
