"""What /metrics counts, of requests as they end and of the engine as it is."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dlx.request import Finish
from tests.serve.fake import FakeEngine
from tests.serve.served import Served
from tests.serve.test_streams import STREAM, counted


def scraped(served: Served) -> dict[str, float]:
    """Every sample by name and labels."""
    families = text_string_to_metric_families(served.client.get("/metrics").text)
    labelled = ((s.name, *sorted(s.labels.items()), s.value) for family in families for s in family.samples)
    return {" ".join([name, *(f"{k}={v}" for k, v in labels)]): value for name, *labels, value in labelled}  # type: ignore[misc]


def test_the_engine_s_figures_are_told_as_they_are(fake: Served) -> None:
    now, stats = scraped(fake), FakeEngine().stats()
    assert now["dlx_tokens_total"] == stats.tokens
    assert now["dlx_forwards_total"] == stats.forwards
    assert now["dlx_prefill_forwards_total"] == stats.prefill_forwards
    assert now["dlx_prefix_cache_hits_tokens_total"] == stats.prefix_hits
    assert now["dlx_prefix_cache_queries_tokens_total"] == stats.prefix_queries
    assert now["dlx_preemptions_total"] == stats.preemptions
    assert now["dlx_graph_replays_total"] == stats.replays
    assert now["dlx_eager_fallback_total"] == stats.eager_steps
    assert (now["dlx_requests_waiting"], now["dlx_requests_running"]) == (stats.waiting, stats.running)
    assert now["dlx_kv_pages state=used"] == stats.pages_used
    assert now["dlx_kv_cache_usage_ratio"] == stats.pages_used / stats.pages_total
    assert now["dlx_engine_status status=ready"] == 1


ENDS = {
    "eos": ({}, None, "outcome=finished reason=eos"),
    "stop string": ({"stop": "two"}, None, "outcome=finished reason=stop_string"),
    "length": ({"max_tokens": 2}, None, "outcome=finished reason=length"),
    "repetition": ({}, (Finish.REPETITION, ""), "outcome=finished reason=repetition"),
    "timeout, streamed": ({"stream": True}, (Finish.TIMEOUT, ""), "outcome=aborted reason=timeout"),
    "timeout": ({}, (Finish.TIMEOUT, ""), "outcome=failed reason=timeout"),
    "error": ({}, (Finish.ERROR, "boom"), "outcome=failed reason=engine_error"),
    "error, streamed": ({"stream": True}, (Finish.ERROR, "boom"), "outcome=failed reason=engine_error"),
    "refused": ({"n": 0}, None, "outcome=rejected reason=invalid_value"),
    "another model": ({"model": "x"}, None, "outcome=rejected reason=model_not_found"),
}


@pytest.mark.parametrize(("asked", "ends", "labels"), ENDS.values(), ids=ENDS.keys())
def test_a_request_is_counted_once_by_its_end(fake: Served, asked: dict, ends: tuple | None, labels: str) -> None:
    before, fake.engine.ends = scraped(fake), ends
    fake.client.post("/v1/completions", json={"prompt": "a", **asked})
    now = scraped(fake)
    changed = {name for name in now if name.startswith("dlx_requests_total") and now[name] != before.get(name, 0.0)}
    assert changed == {f"dlx_requests_total {labels}"}
    assert now[f"dlx_requests_total {labels}"] == before.get(f"dlx_requests_total {labels}", 0.0) + 1


def test_times_and_tokens_per_forward_are_observed_once_a_request(fake: Served) -> None:
    names = ("time_to_first_block_seconds", "request_queue_time_seconds", "e2e_request_latency_seconds")
    names += ("tokens_per_forward", "time_per_output_block_seconds")
    before = [counted(fake, f"dlx_{name}_count") for name in names]
    fake.client.post("/v1/completions", json=STREAM)
    assert [counted(fake, f"dlx_{name}_count") for name in names] == [n + 1 for n in before]


def test_servers_of_one_process_count_for_themselves(fake: Served) -> None:
    with Served(FakeEngine()) as other:
        other.client.post("/v1/completions", json={"prompt": "a"})
        assert counted(other, "dlx_tokens_per_forward_count") == 1
