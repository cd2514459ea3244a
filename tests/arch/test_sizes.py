"""Files stay small enough to be read whole; the limits are raised here or not at all."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE_LINES = 300
PACKAGE_LINES = 24_800
VAGUE = ("util", "common", "base", "manager", "helper", "types")


def files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_no_file_outgrows_its_noun() -> None:
    assert not {str(path.relative_to(ROOT)): n for path in files("dlx", "tools") if (n := lines(path)) > FILE_LINES}


def test_the_package_stays_within_its_total() -> None:
    assert sum(map(lines, files("dlx"))) < PACKAGE_LINES


def test_every_file_is_named_by_a_noun() -> None:
    parts = {part for path in files("dlx", "tools") for part in path.relative_to(ROOT).with_suffix("").parts}
    assert not [part for part in parts if any(word in part for word in VAGUE)]
