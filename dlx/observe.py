"""Seeing the host at work: named NVTX ranges, shown by nsys and ncu, free where no tool listens."""

from __future__ import annotations

from contextlib import AbstractContextManager

import nvtx


def span(name: str) -> AbstractContextManager[object]:
    """A range of the timeline named for a verb of the host: plan, launch, harvest, take."""
    return nvtx.annotate(name, domain="dlx")
