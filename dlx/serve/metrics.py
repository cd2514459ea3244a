"""What the server counts, for Prometheus: a registry of its own, read when it is scraped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import dlx
from dlx.request import Output

if TYPE_CHECKING:
    from dlx.async_engine import AsyncEngine

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKENS = (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
# counters and gauges of the engine: name, what it is, field of its Stats
COUNTERS = (
    ("dlx_tokens", "Tokens committed", "tokens"),
    ("dlx_forwards", "Denoise forwards, those of a row counted once each", "forwards"),
    ("dlx_prefill_forwards", "Prefill forwards", "prefill_forwards"),
    ("dlx_prefix_cache_queries_tokens", "Prompt tokens looked up in the prefix cache", "prefix_queries"),
    ("dlx_prefix_cache_hits_tokens", "Prompt tokens found in the prefix cache", "prefix_hits"),
    ("dlx_preemptions", "Requests that gave their pages up and began anew", "preemptions"),
    ("dlx_graph_replays", "Launches of captured graphs", "replays"),
    ("dlx_eager_fallback", "Launches without a captured graph", "eager_steps"),
)
GAUGES = (
    ("dlx_requests_waiting", "Requests that wait to be admitted", "waiting"),
    ("dlx_requests_running", "Requests that decode", "running"),
    ("dlx_queued_tokens", "Tokens of prompts and answers that wait", "queued_tokens"),
)
STATES = ("new", "starting", "ready", "draining", "unhealthy", "closed")


class Metrics:
    """Counts of one server; several of them in a process do not meet."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._registry = CollectorRegistry(auto_describe=True)
        self._registry.register(Scrape(engine))
        own = self._registry
        self.requests = Counter("dlx_requests", "Requests by how they ended", ("outcome", "reason"), registry=own)
        self.http = Gauge("dlx_http_requests_in_progress", "HTTP requests in progress", registry=own)
        self.first = Histogram(
            "dlx_time_to_first_block_seconds", "From arrival to the first block", buckets=SECONDS, registry=own
        )
        self.block = Histogram(
            "dlx_time_per_output_block_seconds",
            "Mean of a request, from the first block on",
            buckets=SECONDS,
            registry=own,
        )
        self.queue = Histogram(
            "dlx_request_queue_time_seconds", "From arrival to admission", buckets=SECONDS, registry=own
        )
        self.total = Histogram(
            "dlx_e2e_request_latency_seconds", "From arrival to the end", buckets=SECONDS, registry=own
        )
        self.parallel = Histogram("dlx_tokens_per_forward", "Of a request", buckets=TOKENS, registry=own)
        Gauge("dlx_build_info", "1", ("version",), registry=own).labels(dlx.__version__).set(1)

    def ended(self, outcome: str, reason: str, output: Output | None = None, blocks: int = 0) -> None:
        """Count one request.

        outcome  finished, aborted, failed, rejected
        blocks   chunks with tokens that it came in
        """
        self.requests.labels(outcome, reason).inc()
        if output is None:
            return
        times = output.timings
        self.queue.observe(times.admitted_s)
        self.total.observe(times.total_s)
        if output.tokens:
            self.first.observe(times.first_block_s)
            self.parallel.observe(output.tokens_per_forward)
        if blocks > 1:
            self.block.observe((times.total_s - times.first_block_s) / (blocks - 1))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class Scrape(Collector):
    """The engine's own counts, as they are when asked for: the loop pays nothing for them."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        status = GaugeMetricFamily("dlx_engine_status", "1 for the engine's status", labels=("status",))
        now = self._engine.health().status
        for state in STATES:
            status.add_metric((state,), float(state == now))
        yield status
        if now not in ("ready", "draining"):
            return
        stats = self._engine.stats()
        for name, what, field in COUNTERS:
            yield CounterMetricFamily(name, what, getattr(stats, field))
        for name, what, field in GAUGES:
            yield GaugeMetricFamily(name, what, getattr(stats, field))
        pages = GaugeMetricFamily("dlx_kv_pages", "K/V pages", labels=("state",))
        for state, n in (("total", stats.pages_total), ("used", stats.pages_used), ("cached", stats.pages_cached)):
            pages.add_metric((state,), n)
        yield pages
        share = stats.pages_used / max(stats.pages_total, 1)
        yield GaugeMetricFamily("dlx_kv_cache_usage_ratio", "Share of the K/V pages that is in use", share)
