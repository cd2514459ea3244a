"""From a function to a graph: eager, compiled by Inductor, or compiled and captured. The only file that captures."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch
from triton.errors import TritonError

from dlx.errors import ConfigError
from dlx.graphs.either import Either, commits, each
from dlx.graphs.loop import Launch, unrolled
from dlx.graphs.modes import Mode
from dlx.graphs.nodes import Nodes

log = logging.getLogger(__name__)

Route = Literal["while", "unrolled"]  # how a launch of several turns runs: as one graph, or a graph a turn
ALIASING = "check_custom_op_aliasing"  # a setting of torch; not of every version
MOST_GRAPHS = 1 << 16  # of one function and process
WARM_UPS = 2  # runs before a capture: compilation, cuBLAS workspaces
REFUSED = (ImportError, AttributeError, RuntimeError, TritonError)  # what a driver without conditional nodes raises


class Graphs:
    """Functions without arguments by key, made ready once and then replayed; their tensors are fixed.

    A function must leave its tensors in a state from which it may run again: it is run to warm up.
    """

    def __init__(self, mode: Mode, device: torch.device) -> None:
        if mode == "capture" and device.type != "cuda":
            raise ConfigError(f"graphs='capture' needs a CUDA device, not {device}; use 'compile' or 'off'")
        self.mode = mode
        self.device = device
        self.wide = None if device.type == "cpu" else True  # which of an Either the host runs; None: as the rows ask
        self.compiled: Callable[[Callable[[], None]], Callable[[], Any]] = compiled  # a pack brings another
        self._run: dict[Hashable, Callable[[], None]] = {}
        self._turns: dict[Hashable, Callable[[], None]] = {}  # of loops
        self.routes: dict[Hashable, Route] = {}
        self.dropped: set[Hashable] = set()  # there was no memory to capture these: they are compiled alone
        self._kept: list[object] = []
        self._side: torch.cuda.Stream | None = None  # of all warm-ups: cuBLAS keeps a workspace a stream
        self._pool = torch.cuda.graph_pool_handle() if mode == "capture" else None

    def __contains__(self, key: Hashable) -> bool:
        return key in self._run

    def add(self, key: Hashable, fn: Callable[[], None] | Either) -> None:
        """Make `fn` replayable as `key`. Add the largest first: smaller graphs reuse its memory."""
        began = time.monotonic()
        ready = self._compiled(fn)
        host = self._by_host(ready)
        if self.mode != "capture":
            self._run[key] = host
            return
        with self._or(key, host):
            self._run[key] = self._joined(each(self._graph, ready))
            log.info("captured %s in %.1f s", key, time.monotonic() - began)

    def add_loop(
        self, key: Hashable, begin: Callable[[], None], turn: Callable[[], None] | Either, launch: Launch, unroll: bool
    ) -> None:  # fmt: skip
        """Make a launch of several turns replayable as `key`; `unroll` keeps the turns apart, for profiles."""
        self.routes[key] = "unrolled"
        begin, turn = self._compiled(begin), self._compiled(turn)
        host = self._by_host(turn)
        if self.mode != "capture":
            self._run[key], self._turns[key] = unrolled(begin, host, launch), host
            return
        with self._or(key, unrolled(begin, host, launch), host):
            self._capture_loop(key, begin, turn, launch, unroll)

    def _compiled(self, fn: Any) -> Any:
        """A function ready to run, or both of an Either: the one that is rare is compiled now, not when it comes."""
        if self.mode == "off":
            return fn
        ready = each(self.compiled, fn)
        if isinstance(ready, Either) and self.wide is None:
            ready.wide()
        return ready

    def _by_host(self, turn: Callable[[], None] | Either) -> Callable[[], None]:
        """A turn without a choice on the device, for whose rows the host would have to wait."""
        if not isinstance(turn, Either):
            return turn

        def run() -> None:
            wide = commits(turn.whole, turn.done) if self.wide is None else self.wide
            (turn.wide if wide else turn.narrow)()

        return run

    def _capture_loop(
        self, key: Hashable, begin: Callable[[], None], turn: Callable[[], None] | Either, launch: Launch, unroll: bool
    ) -> None:  # fmt: skip
        first, step = self._graph(begin), each(self._graph, turn)
        alone = cache(lambda: self._joined(step))
        self._turns[key] = lambda: alone()()
        if not unroll:
            try:
                loop = Nodes(step, first, launch)
            except REFUSED as error:
                log.warning("no loop on the device, turns are launched one by one: %s", error)
            else:
                self._kept.append(loop)
                self._run[key], self.routes[key] = loop.replay, "while"
                return
        first.instantiate()
        self._run[key] = unrolled(first.replay, alone(), launch)

    def _joined(self, turn: torch.cuda.CUDAGraph | Either) -> Callable[[], None]:
        """A captured turn as one launch; the device chooses between the forwards of an Either."""
        if isinstance(turn, Either):
            try:
                chosen = Nodes(turn)
            except REFUSED as error:
                log.warning("no choice on the device, so that all places are computed in each forward: %s", error)
            else:
                self._kept.append(chosen)
                return chosen.replay
        graph = turn.wide if isinstance(turn, Either) else turn
        graph.instantiate()
        return graph.replay

    def replay(self, key: Hashable) -> None:
        """Run the graph of `key` on the current stream."""
        self._run[key]()

    def turn(self, key: Hashable) -> None:
        """Run one turn of the loop `key`, or all of what is no loop: for measurements, as the host is told nothing."""
        self._turns.get(key, self._run[key])()

    @contextmanager
    def _or(self, key: Hashable, run: Callable[[], None], turn: Callable[[], None] | None = None) -> Iterator[None]:
        """Where memory runs out while `key` is captured, take this instead: the same, compiled alone."""
        stream = torch.cuda.current_stream(self.device)
        try:
            yield
        except RuntimeError as error:
            if not short(error):
                raise
            torch.cuda.set_stream(stream)  # a capture that cannot be ended leaves its own
            self.dropped.add(key)
            self._run[key], self._turns[key] = run, turn or run
            log.warning(
                "no memory to capture %s: it runs compiled alone, or in a larger graph; lower gpu_memory_utilization, "
                "max_num_seqs or num_pages: %s", key, error
            )  # fmt: skip
        if key in self.dropped:
            torch.cuda.empty_cache()  # what the error held is free only now

    def _graph(self, fn: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """`fn` captured, to be instantiated or to be put into another graph."""
        side = self._side = self._side or torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                fn()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        # what other threads do meanwhile, with a model of their own, say, is none of the capture's business
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            fn()
        self._kept.append(graph)
        return graph


def short(error: BaseException | None) -> bool:
    """Whether an error says that memory ran out, or came of one that does."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def compiled(fn: Callable[..., Any], numbered: bool = False, **settings: Any) -> Callable[..., Any]:
    """`fn` through Inductor as one graph, with Inductor's own CUDA graphs off: they clash with ours.

    numbered  whether kernels are numbered, not named for what they fuse. Such names pass 150 characters, to which
              Triton cuts those of its files; torch then finds no cubin to launch by itself, as a pack's graphs need it
    """
    import torch._dynamo  # 3 s to import: only where something is compiled
    import torch._functorch.config
    import torch._inductor.config

    inner = torch.compile(fn, fullgraph=True, dynamic=False, **settings)
    # torch checks each first run for ops that alias; where ops compile what they run, it is compiled for that once more
    unchecked = {ALIASING: False} if hasattr(torch._functorch.config, ALIASING) else {}
    inductor: dict[str, object] = {"triton.cudagraphs": False}
    if numbered:
        inductor["triton.descriptive_names"] = False

    def run(*args: Any) -> Any:
        # one function is compiled once a bucket of each engine of the process: Dynamo's limits expect a few
        with (
            torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS, accumulated_recompile_limit=MOST_GRAPHS),
            torch._inductor.config.patch(inductor),
            torch._functorch.config.patch(unchecked),
        ):
            return inner(*args)

    return run
