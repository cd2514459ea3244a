"""Whether answers are the same alone and together: counted, not assumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from dlx.bench import How, Scene, invariance
from dlx.bench import invariant as measured
from dlx.bench.report import sentence

SCENE = Scene(Path(), block=16, context=40, requests=3, accept=4)
CPU = How(graphs="off", device="cpu")


def test_answers_alone_and_together_are_compared(nano: Path) -> None:
    record = invariance(SCENE._replace(shape=nano), CPU, 7, 24, "python bench")
    assert record["invariant"]["same"] == 7 and record["invariant"]["rows"] == [3]
    assert record["plain"]["rows"] == [1, 2, 3]
    assert record["cost"]["alone_s"] == pytest.approx(record["invariant"]["alone_s"] / record["plain"]["alone_s"])
    assert "7 requests of up to 40 + 24 tokens, 3 at once: 7 the same alone and in a batch" in sentence(record)


def test_an_answer_that_differs_in_a_batch_is_not_counted(nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = measured.answers

    def spoilt(engine, asked):
        found = true(engine, asked)
        return found if len(asked) == 1 else [(found[0][0][:-1], found[0][1]), *found[1:]]

    monkeypatch.setattr(measured, "answers", spoilt)
    assert invariance(SCENE._replace(shape=nano), CPU, 5, 24, "python bench")["invariant"]["same"] == 3
