"""The search for launch configurations: what it tries, keeps and writes; timing itself needs a GPU."""

from __future__ import annotations

import json
import math
import time
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dlx.ops import linear
from dlx.ops import tuned as records
from dlx.ops.bench import search as searching
from dlx.ops.bench import tune
from dlx.ops.bench.chain import Built, Took
from dlx.ops.bench.report import Roof
from dlx.ops.bench.search import FAR, Ask, Best, answering, apart, asked, neighbours, search, with_config
from dlx.ops.bench.tune import merged
from dlx.ops.op import Cost
from tools import tune as tool

GPU = "NVIDIA H100 80GB HBM3"


class Launch(NamedTuple):
    BN: int
    splits: int
    warps: int
    fused: bool = False


CODE = Launch(64, 1, 4)


def ask(fits: Any = lambda config: True) -> Ask:
    return Ask("matmul", (8, 512), CODE, fits)


def cost(config: Launch) -> float:
    """A bowl with its lowest point at 32 rows, 4 splits, 8 warps, fused."""
    far = [math.log2(config.BN / 32), math.log2(config.splits / 4), math.log2(config.warps / 8)]
    return 10 + sum(x * x for x in far) + (not config.fused)


def forever() -> float:
    return time.monotonic() + 60


def test_the_search_finds_the_fastest_configuration() -> None:
    best, times = search(ask(), cost, forever())
    assert best == Launch(32, 4, 8, True)
    assert len(times) < 60 and times[best] == min(times.values()) == cost(best)


def test_a_configuration_that_fails_or_does_not_fit_is_not_taken() -> None:
    seen = []

    def took(config: Launch) -> float:
        seen.append(config)
        return math.inf if config.splits == 4 else cost(config)

    best, _ = search(ask(lambda config: config.warps < 8), took, forever())
    assert best.splits in (2, 3, 6, 8) and best.warps == 4
    assert all(config.warps < 8 for config in seen)
    assert len(set(seen)) == len(seen)


def test_when_time_is_over_the_best_so_far_is_given() -> None:
    assert search(ask(), cost, time.monotonic() - 1) == (CODE, {CODE: cost(CODE)})


def test_a_search_begins_at_what_is_recorded_if_that_is_faster() -> None:
    known = Launch(32, 4, 8)
    assert search(ask(), cost, time.monotonic() - 1, known)[0] == known
    assert search(ask(), cost, time.monotonic() - 1, Launch(256, 32, 1))[0] == CODE


def test_a_larger_tile_that_does_not_fit_is_tried_with_a_shorter_pipeline() -> None:
    class Tile(NamedTuple):
        BN: int
        stages: int

    fits = lambda config: config.BN * config.stages <= 256  # noqa: E731
    faster_by_tile = Ask("matmul", (8, 512), Tile(64, 4), fits)
    best, times = search(faster_by_tile, lambda config: 1 / config.BN, forever())
    assert best == Tile(256, 1) and Tile(128, 2) in times
    assert all(map(fits, times))


def test_what_is_less_than_the_gain_is_noise() -> None:
    noise = lambda config: 100.0 - 0.1 * config.fused  # noqa: E731
    assert search(ask(), noise, forever())[0] == CODE
    assert search(ask(), noise, forever(), gain=0.9995)[0] == CODE._replace(fused=True)


def test_neighbours_differ_in_one_field() -> None:
    assert neighbours(CODE, "BN") == [CODE._replace(BN=32), CODE._replace(BN=128)]
    assert neighbours(CODE, "fused") == [CODE._replace(fused=True)]
    assert {config.warps for config in neighbours(CODE, "warps")} == {1, 2, 8, 16}
    assert all(config._replace(splits=1) == CODE for config in neighbours(CODE, "splits"))


def test_results_are_compared_by_their_size_and_ids_by_how_many_differ() -> None:
    x = torch.arange(1.0, 101)
    assert apart(x, x) == 0
    assert apart(x * 1.1, x) == pytest.approx(0.1)
    assert apart((x, torch.tensor([1, 2, 3, 4])), (x, torch.tensor([1, 2, 3, 5]))) == 0.25
    assert not apart(x * math.nan, x) <= FAR


@cache
def choose_launch(rows: int) -> Launch:
    return records.tuned("matmul", (rows, 512), CODE)


def test_an_op_is_asked_and_answered_and_nothing_of_it_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "choose_launch", choose_launch, raising=False)
    assert choose_launch(8) == CODE
    (found,) = asked(lambda i: (choose_launch(8), choose_launch(8)))
    assert found[:3] == ("matmul", (8, 512), CODE)
    other = Launch(16, 2, 8)
    with answering(with_config({("matmul", (8, 512)): other})):
        assert (choose_launch(8), choose_launch(16)) == (other, CODE)
    assert choose_launch(8) == CODE


def entry(rows: int, BN: int, us: float = 1.0) -> dict[str, Any]:
    return {"key": [rows, 512], "config": Launch(BN, 1, 4)._asdict(), "us": us}


def test_new_entries_replace_those_of_their_key_and_others_stay() -> None:
    old = {"schema": 1, "configs": [entry(32, 64), entry(4, 64)]}
    assert merged(old, [entry(32, 16), entry(8, 16)]) == [entry(4, 64), entry(8, 16), entry(32, 16)]
    assert merged({"schema": 0, "configs": [entry(4, 64)]}, [entry(8, 16)]) == [entry(8, 16)]
    assert merged([], [entry(8, 16)]) == [entry(8, 16)]


def test_entries_with_other_fields_are_dropped() -> None:
    old = {"schema": 1, "configs": [{"key": [4, 512], "config": {"BN": 64}}, "nonsense", {"config": 3}]}
    assert merged(old, [entry(8, 16)]) == [entry(8, 16)]


def test_what_is_written_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(records, "folder", lambda: tmp_path)
    found = Best(Launch(32, 4, 8, True), 10.0, 12.0, {})
    built = Built(lambda i: None, {}, 2, Cost(0, 5_000_000))
    tune.write(tmp_path, "matmul", [tune.described("a case", ask(), built, found, Roof(1e12, 1e15))], "dlx tune")
    path = tune.write(tmp_path, "matmul", [entry(32, 16)], "dlx tune")
    assert records.tuned("matmul", (8, 512), CODE) == found.config
    assert records.tuned("matmul", (40, 512), CODE) == Launch(16, 1, 4)
    text = path.read_text()
    assert '"of_roof": 0.5' in text and '"capability"' in text and '"commit"' in text


def test_trials_are_noted_the_fastest_first(tmp_path: Path) -> None:
    for title in ("one", "two"):
        tune.note(tmp_path / "trials.jsonl", title, {CODE: math.inf, Launch(32, 4, 8): 2.0, Launch(16, 4, 8): 1.0})
    lines = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert [line["us"] for line in lines] == [1.0, 2.0, None] * 2
    assert lines[3] == {"case": "two", "config": Launch(16, 4, 8)._asdict(), "us": 1.0}


def timings(default_us: float, best_us: float) -> Any:
    return lambda graphs, n, rounds=9: (
        {name: Took(us, us, us) for name, us in (("default", default_us), ("best", best_us)) if name in graphs}
        or {"own": Took(best_us, best_us, best_us)}
    )


@pytest.mark.parametrize(("best_us", "taken"), [(9.0, True), (9.99, False)])
def test_the_code_stays_where_nothing_is_clearly_faster(
    best_us: float, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def own(i: int) -> Tensor:
        return torch.full((3,), float(i)) if choose_launch(8) else torch.empty(0)

    monkeypatch.setattr(linear, "choose_launch", choose_launch, raising=False)
    monkeypatch.setattr(searching, "captured", lambda call, copies, n: call(0))
    monkeypatch.setattr(searching, "turns", timings(10.0, best_us))
    monkeypatch.setattr(searching, "search", lambda *_: (Launch(32, 4, 8), {}))
    case: Any = type("Case", (), {"build": lambda self, device: Built(own, {}, 2, Cost(0, 1000))})()
    ((question, _, best),) = searching.tune(case, torch.device("cpu"), set(), forever())
    assert question.key == (8, 512)
    assert best.config == (Launch(32, 4, 8) if taken else CODE)
    assert not list(searching.tune(case, torch.device("cpu"), {("matmul", (8, 512))}, forever()))


def test_without_a_gpu_the_tool_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tool.main(["--op", "linear"]) == 2
    assert "tuned on a GPU" in capsys.readouterr().err


def test_a_case_is_told_in_words_or_as_one_json_object() -> None:
    entry = {"key": [8, 512], "us": 1.5}
    assert tune.line("linear x", 3, entry, as_json=False) == 'linear x: 3 tried, {"key": [8, 512], "us": 1.5}'
    assert json.loads(tune.line("linear x", 3, entry, as_json=True)) == {"case": "linear x", "tried": 3, **entry}
