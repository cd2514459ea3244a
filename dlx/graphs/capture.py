"""From a function to a graph: eager, compiled by Inductor, or compiled and captured. The only file that captures."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Literal

import torch
from triton.errors import TritonError

from dlx.errors import ConfigError
from dlx.graphs.either import Either, both, commits
from dlx.graphs.loop import Launch, unrolled
from dlx.graphs.modes import Mode
from dlx.graphs.nodes import Nodes

log = logging.getLogger(__name__)

Route = Literal["while", "unrolled"]  # how a launch of several turns runs: as one graph, or a graph a turn
ALIASING = "check_custom_op_aliasing"  # a setting of torch; not of every version
MOST_GRAPHS = 1 << 16  # of one function and process
WARM_UPS = 2  # runs before a capture: compilation, cuBLAS workspaces
# what comes of a driver without conditional nodes
REFUSED = (ImportError, AttributeError, RuntimeError, TypeError, TritonError)


class Graphs:
    """Functions without arguments by key, made ready once and then replayed; their tensors are fixed.

    A function must leave its tensors in a state from which it may run again: it is run to warm up.
    """

    def __init__(self, mode: Mode, device: torch.device) -> None:
        if mode == "capture" and device.type != "cuda":
            raise ConfigError(f"graphs='capture' needs a CUDA device, not {device}; use 'compile' or 'off'")
        self.mode = mode
        self.device = device
        # whether an Either's committing forward runs; None: where a row asks for it, as the device or a CPU's host sees
        self.commits = None if mode == "capture" or device.type == "cpu" else True
        self.compiled: Callable[[Callable[[], None]], Callable[[], Any]] = compiled  # a pack brings another
        self._run: dict[Hashable, Callable[[], None]] = {}
        self._turns: dict[Hashable, Callable[[], None]] = {}  # of loops
        self.routes: dict[Hashable, Route] = {}
        self.dropped: set[Hashable] = set()  # there was no memory to capture these: they are compiled alone
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
            self._run[key] = self._joined(both(self._graph, ready))
            log.info("captured %s in %.1f s", key, time.monotonic() - began)

    def add_loop(
        self, key: Hashable, begin: Callable[[], None], turn: Callable[[], None] | Either, launch: Launch, unroll: bool
    ) -> None:
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
        """A function, or both of an Either, ready to run; the committing one alone where the other never runs."""
        if self.mode == "off":
            return fn
        if self.commits and isinstance(fn, Either):
            fn = fn.committing
        ready = both(self.compiled, fn)
        if isinstance(ready, Either) and self.mode == "compile":
            ready.committing()  # it is rare: compiled now, not when it comes
        return ready

    def _by_host(self, turn: Callable[[], None] | Either) -> Callable[[], None]:
        """A turn without a choice on the device, whose rows the host reads on a CPU alone."""
        if not isinstance(turn, Either):
            return turn

        def run() -> None:
            asked = self.commits
            if asked is None:
                asked = self.device.type != "cpu" or commits(turn.whole, turn.done)
            (turn.committing if asked else turn.plain)()

        return run

    def _capture_loop(
        self, key: Hashable, begin: Callable[[], None], turn: Callable[[], None] | Either, launch: Launch, unroll: bool
    ) -> None:
        first, step = self._graph(begin), both(self._graph, turn)
        self._turns[key] = alone = _late(partial(self._joined, step))
        nodes = None if unroll else self._nodes(step, first, launch)
        if nodes:
            self._run[key], self.routes[key] = nodes.replay, "while"
        else:
            first.instantiate()
            self._run[key] = unrolled(first.replay, alone, launch)

    def _joined(self, turn: torch.cuda.CUDAGraph | Either) -> Callable[[], None]:
        """A captured turn as one launch; the device chooses between the forwards of an Either."""
        nodes = self._nodes(turn) if isinstance(turn, Either) else None
        if nodes:
            return nodes.replay
        graph = turn.committing if isinstance(turn, Either) else turn
        graph.instantiate()
        return graph.replay

    def _nodes(self, turn: torch.cuda.CUDAGraph | Either, *loop: Any) -> Nodes | None:
        """Captured parts joined on the device, of a loop without a choice if need be; None where that is refused."""
        try:
            return Nodes(turn, *loop)
        except REFUSED as error:
            if not isinstance(turn, Either):
                log.warning("no loop on the device, turns are launched one by one: %s", error)
                return None
            self.commits = True  # of graphs to come too
            log.warning("no choice on the device, every forward computes all places: %s", error)
        return self._nodes(turn.committing, *loop) if loop else None

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
        return graph


def _late(make: Callable[[], Callable[[], None]]) -> Callable[[], None]:
    """Made when it is first run."""
    made = cache(make)
    return lambda: made()()


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
