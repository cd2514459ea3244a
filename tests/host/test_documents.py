"""Files of settings: what is read of them, and what is refused with its line."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlx.documents import LONGEST_BYTES, read
from dlx.errors import ConfigError


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("off", "off"), ("yes", "yes"), ("on", "on"), ("true", True), ("False", False), ("8", 8), ("-3", -3),
        ("010", "010"), ("0x10", "0x10"), ("1:30", "1:30"), ("1e-3", 0.001), (".5", 0.5), ("2026-11-30", "2026-11-30"),
        ("~", None), ("", None), ("null", None), ("'8'", "8"), ("[1, a]", [1, "a"]), ("{a: {b: 1}}", {"a": {"b": 1}}),
        ("é", "é"),
    ],
)  # fmt: skip
def test_words_are_those_of_yaml_1_2(tmp_path: Path, text: str, expected: object) -> None:
    value = read(written(tmp_path, f"x: {text}\n"))["x"]
    assert (value, type(value)) == (expected, type(expected))


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_an_empty_file_sets_nothing(tmp_path: Path, text: str) -> None:
    assert read(written(tmp_path, text)) == {}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: the key 'a' stands twice"),
        ("a: {b: 1, b: 2}\n", "line 1: the key 'b' stands twice"),
        ("a: 1\nb: !!python/object/apply:os.system [ls]\n", "line 2: the tag"),
        ("b: !!str 1\n", "line 1: the tag"),
        ("b: !own 1\n", "line 1: the tag"),
        ("a: &x [1]\nb: *x\n", "line 2: aliases are not allowed"),
        ("1: a\n", "line 1: a key is not text"),
        ("? [a]\n: b\n", "line 1: a key is not text"),
        ("a: [1,\n", "line 2"),
        ("a: 1\n b: 2\n", "line 2"),
        ("a: 1\n---\nb: 2\n", "line 2"),
        ("- a\n", "holds a list"),
        ("text\n", "holds a str"),
        (b"a: \xff\n", "not UTF-8 at byte 3"),
        ("a: \x00\n", "is not YAML"),
        ("[" * 3000, "is not YAML"),
        ("a: " + "x" * LONGEST_BYTES, "more than 1,048,576 bytes"),
    ],
)
def test_what_is_not_plain_is_refused_where_it_stands(tmp_path: Path, text: str | bytes, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(written(tmp_path, text))
    assert named in str(caught.value)
    assert "settings.yaml" in str(caught.value)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary() | st.text("ab:-[]{},'\"\n #&*!|>?%@~01.e").map(str.encode))
def test_any_bytes_are_read_or_refused(tmp_path: Path, data: bytes) -> None:
    with contextlib.suppress(ConfigError):
        assert isinstance(read(written(tmp_path, data)), dict)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml cannot be read: No such file"):
        read(tmp_path / "gone.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read(tmp_path)
