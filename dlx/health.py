"""What an AsyncEngine is allowed and what it tells of itself."""

from __future__ import annotations

from typing import Literal, NamedTuple

Status = Literal["new", "starting", "ready", "draining", "unhealthy", "closed"]


class Limits(NamedTuple):
    """How much may wait, and for how long.

    max_queued         requests that wait for a slot
    max_queued_tokens  their prompts and max_tokens together; None takes 8 times what the K/V pages hold
    timeout_s          from arrival to the last token
    queue_timeout_s    from arrival to a slot
    watchdog_s         a turn of the engine; one that takes longer hangs
    """

    max_queued: int = 256
    max_queued_tokens: int | None = None
    timeout_s: float = 600.0
    queue_timeout_s: float = 600.0
    watchdog_s: float = 60.0


class Health(NamedTuple):
    """Whether requests are taken, and why not."""

    status: Status
    reason: str


class Stats(NamedTuple):
    """What waits, runs and is held now; from prefix_hits on, counts since the start.

    prefix_hits       tokens of prompts whose K/V was there already, of prefix_queries
    preemptions       requests that gave way to older ones
    replays           launches of graphs; eager_steps are those without
    forwards          denoise forwards, each counted for every request in it
    prefill_forwards  forwards of prompts
    tokens            committed
    finished          requests by what ended them, see `Finish`
    """

    waiting: int
    running: int
    queued_tokens: int
    pages_total: int
    pages_used: int
    pages_cached: int
    prefix_hits: int
    prefix_queries: int
    preemptions: int
    replays: int
    eager_steps: int
    forwards: int
    prefill_forwards: int
    tokens: int
    finished: dict[str, int]
