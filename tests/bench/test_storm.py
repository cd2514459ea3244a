"""The tools of load: answers that are lost or wrong are counted, and what a chunk costs is measured with a server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dlx.bench.overhead import overhead
from dlx.bench.storm import Question, metric, spread, storm
from dlx.request import Finish
from tests.serve.fake import ANSWER, FakeEngine
from tests.serve.served import Served

RIGHT = [Question(f"question {n}", ANSWER) for n in range(5)]


def run(questions: list[Question], *, slots: int = 1000, ends: tuple[Finish, str] | None = None) -> dict[str, Any]:
    """A short storm of eight clients over a fake engine."""
    engine = FakeEngine()
    engine.slots, engine.ends = slots, ends
    with Served(engine) as served:

        def look() -> dict[str, float]:
            return {"waiting": metric(served.client.get("/metrics").text, "dlx_requests_waiting")}

        return asyncio.run(storm(served.url, questions, 8, 0.5, look, 64))


def test_right_answers_are_neither_lost_nor_wrong() -> None:
    record = run(RIGHT)
    assert record["asked"] >= 8
    assert (record["failed"], record["lost"], record["wrong"], record["put_off"]) == (0, 0, 0, 0)
    assert record["total_s"]["worst"] >= record["total_s"]["median"] >= record["first_s"]["median"] * 0.5 > 0


def test_another_s_answer_is_seen() -> None:
    record = run([*RIGHT, Question("question 5", "another answer")])
    assert 0 < record["wrong"] < record["asked"]


def test_a_stream_that_ends_without_an_end_is_lost() -> None:
    record = run(RIGHT, ends=(Finish.ERROR, "boom"))
    assert record["lost"] == record["asked"] >= 8


def test_those_who_are_put_off_come_again() -> None:
    assert run(RIGHT, slots=0)["put_off"] >= 8


def test_a_spread_is_of_the_values() -> None:
    assert spread([0.1, 0.2, 0.9]) == {"median": 0.2, "p99": 0.9, "worst": 0.9}


@pytest.mark.parametrize("streams", [1, 3])
def test_every_chunk_of_the_measured_streams_is_sent(streams: int) -> None:
    record = overhead(streams, 20, 1)
    assert (record["streams"], record["chunks"]) == (streams, 20)
    assert record["with_server_us"] > 0 < record["tickets_alone_us"]
