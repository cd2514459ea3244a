"""docs/faults.md names a test for every case, and no test that is not there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| (\d+) \| .* \| (`.*) \|$", re.MULTILINE)
# numbers of the list of cases; those that it leaves out were never cases
CASES = {
    *range(1, 16),
    *(
        17,
        18,
        19,
        20,
        21,
        22,
        23,
        24,
        25,
        28,
        30,
        31,
        32,
        33,
        34,
        35,
        36,
        37,
        38,
        39,
        40,
        42,
        43,
        44,
        45,
        47,
        48,
        49,
        50,
    ),
    *(51, 52, 54, 56, 57, 58, 59, 60, 62, 64, 65, 68, 69, 70, 71, 73, 74, 75, 76, 77, 78, 80, 82, 83, 85),
    *(87, 90, 91, 92, 93, 94, 95, 97, 98, 100, 101, 102, 104, 105, 106, 108, 109, 110, 111),
    *(112, 114, 115, 116, 117, 118, 119, 120, 121, 122, 123, 126, 127, 128, 130),
}


def rows() -> dict[int, str]:
    return {int(number): tests for number, tests in ROW.findall((ROOT / "docs" / "faults.md").read_text())}


def test_every_case_has_a_row() -> None:
    assert set(rows()) == CASES


def test_every_test_that_is_named_is_there() -> None:
    missing = []
    for number, tests in rows().items():
        named = re.findall(r"`([^`]+)`: ([\w, ]+)", tests)
        assert named, number
        for file, names in named:
            code = (ROOT / "tests" / file).read_text() if (ROOT / "tests" / file).is_file() else ""
            missing += [f"{number}: {file} {n}" for n in names.split(", ") if f"def test_{n}(" not in code]
    assert not missing, "\n".join(missing)
