"""Several forwards in one launch: the step, repeated on the device while a row still runs.

    begin   the launch's outbox is emptied
    turn    one step; what it committed goes behind what the launch has committed so far
    again   another turn is of use: a row runs, the launch has forwards left, and the host did not halt it

On CUDA `while_graph` puts the captured turn into a WHILE node, so that the host sends one launch and sleeps; elsewhere,
and for a profile that is to show every kernel, the turns are run one after the other. Rows that are done are inert, so
both ways give the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import core

from dlx.graphs.buffer import FACTS, RUNNING, BlockBuffer


class Launch(NamedTuple):
    """The static tensors of launches of up to `most` forwards.

    Outbox room is for all that `most` forwards can commit, so it is never full.
    """

    out: Tensor  # [B, most · N·L + FACTS] int32  an Outbox, packed, of all forwards of the launch
    step: Tensor  # [B, N·L + FACTS]       int32  that of one forward
    left: Tensor  # [1]                 int32  forwards that the launch may still run
    on: Tensor  # [1]                 int32  1 while a row runs
    epoch: Tensor  # [1]                 int32  number of the launch
    halt: Tensor  # [1]                 int32  in pinned memory: launches up to this number take no further turn
    most: int


def allocate(B: int, width: int, most: int, device: torch.device, room: int | None = None) -> Launch:
    """width  N·L, what one forward may commit; room: what a launch may, if it is less than that of each forward"""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.int32, device=device)

    halt = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
    return Launch(
        zeros(B, (most * width if room is None else room) + FACTS),
        zeros(B, width + FACTS),
        zeros(1),
        zeros(1),
        zeros(1),
        halt,
        most,
    )


def rows(launch: Launch, B: int) -> Launch:
    """The first B rows."""
    return launch._replace(out=launch.out[:B], step=launch.step[:B])


def running(buf: BlockBuffer) -> Tensor:
    """[B] bool: who is not done."""
    return ~buf.done


def begin_(launch: Launch, buf: BlockBuffer, busy: Callable[[], Tensor]) -> None:
    """An empty outbox, and whether there is anything to do. The host has written `left` and `epoch`.

    busy  → [B] bool: whose row another turn is for; reads the device
    """
    none = torch.zeros_like(buf.age)
    launch.out[:, -FACTS:].copy_(torch.stack((none, buf.age, none, buf.start), 1))
    launch.on.copy_(busy().any()[None])


def turn_(step: Callable[[], None], busy: Callable[[], Tensor], launch: Launch) -> None:
    """One forward of every row, by `step`, which writes `launch.step`; that goes behind what the launch has."""
    step()
    gather_(launch.out, launch.step)
    launch.on.copy_(busy().any()[None])


def gather_(out: Tensor, step: Tensor) -> None:
    """Append a forward's Outbox [B, N·L + FACTS] to that of the launch [B, room + FACTS]."""
    width, room = step.shape[1] - FACTS, out.shape[1] - FACTS
    (n, _, ended, _), (more, nfe, why, start) = out[:, room:].split(1, 1), step[:, width:].split(1, 1)
    at = torch.arange(room, device=out.device, dtype=torch.int32) - n
    new = (at >= 0) & (at < more)
    tok = torch.where(new, step[:, :width].gather(1, at.clamp(0, width - 1).long()), out[:, :room])
    why = torch.where(ended > RUNNING, ended, why)  # a row that ended before says RUNNING
    out.copy_(torch.cat((tok, n + more, nfe, why, start), 1))


def unrolled(begin: Callable[[], None], turn: Callable[[], None], launch: Launch) -> Callable[[], None]:
    """A launch as separate runs of its parts; early exit where reading the device costs nothing."""
    on_host = launch.on.device.type == "cpu"

    def run() -> None:
        begin()
        for _ in range(launch.most):
            if on_host and not again(launch):
                return
            turn()
            launch.left.sub_(1)

    return run


def again(launch: Launch) -> bool:
    """What the WHILE node asks before each turn; reads the device."""
    return bool(launch.on) and int(launch.left) > 0 and int(launch.halt) < int(launch.epoch)


@core.extern
def _set_conditional(handle, value, _semantic=None):
    # the symbol stays undefined in the cubin; the driver resolves it when it loads the kernel
    types = {(core.dtype("int64"), core.dtype("int32")): ("cudaGraphSetConditional", core.dtype("int32"))}
    return core.extern_elementwise("", "", [handle, value], types, is_pure=False, _semantic=_semantic)


@triton.jit
def _set_again(handle_ptr, on_ptr, left_ptr, epoch_ptr, halt_ptr, AFTER: tl.constexpr):
    """Tell the WHILE node whether to go on; AFTER a turn there is one forward less."""
    tid = tl.inline_asm_elementwise("mov.u32 $0, %tid.x;", "=r", [], dtype=tl.int32, is_pure=True, pack=1)
    if tid == 0:  # more than one thread that sets the condition is undefined
        left = tl.load(left_ptr)
        if AFTER:
            left -= 1
            tl.store(left_ptr, left)
        wanted = (tl.load(on_ptr) != 0) & (left > 0)
        wanted = wanted & (tl.load(halt_ptr, volatile=True) < tl.load(epoch_ptr))
        _set_conditional(tl.load(handle_ptr), wanted.to(tl.int32))


class WhileGraph:
    """begin, then a WHILE node around turn, as one executable CUDA graph.

    begin, turn  captured with `keep_graph=True`; kept alive here, for their memory is in use
    Raises RuntimeError  with the failing call, where the driver or cuda.bindings refuses
    """

    def __init__(self, begin: torch.cuda.CUDAGraph, turn: torch.cuda.CUDAGraph, launch: Launch) -> None:
        from cuda.bindings import runtime  # pyright: ignore[reportMissingImports]  (CUDA builds of torch bring it)

        self.rt: Any = runtime
        self.parts = (begin, turn, launch)
        self.graph = self._did("cudaGraphCreate", 0)
        handle = self._did("cudaGraphConditionalHandleCreate", self.graph, 0, 1)
        self.handle = torch.tensor([int(handle)], dtype=torch.uint64).view(torch.int64).to(launch.on.device)
        for after in (False, True):  # compiled and loaded before anything is captured
            at = launch.on, launch.left, launch.epoch, launch.halt
            _set_again.warmup(self.handle, *at, after, grid=(1,), num_warps=1)._init_handles()
        torch.cuda.synchronize()
        first = self._child(self.graph, begin, [])
        asked = self._asked(self.graph, first, after=False)
        node, body = self._while(handle, asked)
        self._asked(body, self._child(body, turn, []), after=True)
        self.exec = self._did("cudaGraphInstantiate", self.graph, 0)
        for destroy, what in ((runtime.cudaGraphDestroy, self.graph), (runtime.cudaGraphExecDestroy, self.exec)):
            weakref.finalize(self, destroy, what).atexit = False  # the driver is gone by then

    def replay(self) -> None:
        """Send the launch on the current stream."""
        self._did("cudaGraphLaunch", self.exec, torch.cuda.current_stream().cuda_stream)

    def _did(self, name: str, *args: Any) -> Any:
        error, *rest = getattr(self.rt, name)(*args)
        if int(error) != 0:
            raise RuntimeError(f"{name} failed: {error!r}")
        return rest[0] if len(rest) == 1 else tuple(rest)

    def _set(self, after: bool) -> None:
        launch = self.parts[2]
        run: Any = _set_again[(1,)]
        run(self.handle, launch.on, launch.left, launch.epoch, launch.halt, after, num_warps=1)

    def _child(self, graph: Any, part: torch.cuda.CUDAGraph, after: list[Any]) -> Any:
        raw = self.rt.cudaGraph_t(int(part.raw_cuda_graph()))
        return self._did("cudaGraphAddChildGraphNode", graph, after or None, len(after), raw)

    def _asked(self, graph: Any, before: Any, after: bool) -> Any:
        """The kernel that sets the condition, captured into `graph` behind the node `before`; the new last node."""
        stream = torch.cuda.Stream()
        relaxed = self.rt.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        self._did("cudaStreamBeginCaptureToGraph", stream.cuda_stream, graph, [before], None, 1, relaxed)
        try:
            with torch.cuda.stream(stream):
                self._set(after)
        finally:
            self._did("cudaStreamEndCapture", stream.cuda_stream)
        nodes, _ = self._did("cudaGraphGetNodes", graph, self._did("cudaGraphGetNodes", graph, 0)[1])
        return next(node for node in nodes if int(node) != int(before))

    def _while(self, handle: Any, before: Any) -> tuple[Any, Any]:
        params = self.rt.cudaGraphNodeParams()
        params.type = self.rt.cudaGraphNodeType.cudaGraphNodeTypeConditional
        params.conditional.handle = handle
        params.conditional.type = self.rt.cudaGraphConditionalNodeType.cudaGraphCondTypeWhile
        params.conditional.size = 1
        node = self._did("cudaGraphAddNode", self.graph, [before], None, 1, params)
        self.params = params
        return node, params.conditional.phGraph_out[0]
