"""Seeing dlx at work: ranges named for its verbs, which nsys, ncu and torch's profiler show; free if none listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import nvtx
import torch

DOMAIN = "dlx"


def span(name: str) -> AbstractContextManager[object]:
    """A range of the timeline: plan, launch, prefill, step, harvest, take, or a part of an eager step."""
    listening = torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]
    return _recorded(name) if listening else nvtx.annotate(name, domain=DOMAIN)


def marked(step: Callable[..., None]) -> Callable[[], None]:
    """An eager step that shows its parts: what it tells to `at` ends the range before and begins the one it names.

    Not for a step that is compiled: NVTX breaks its graph, and torch's ranges vanish from it.
    """

    def run() -> None:
        with ExitStack() as shown:

            def at(verb: str) -> None:
                shown.close()
                shown.enter_context(span(verb))

            step(at=at)

    return run


@contextmanager
def _recorded(name: str) -> Iterator[None]:
    with nvtx.annotate(name, domain=DOMAIN), torch.profiler.record_function(f"{DOMAIN}:{name}"):
        yield
