"""One executable CUDA graph of captured parts and conditional nodes; kernels among them set the conditions.

IF     a turn that is an Either: the committing forward if a row has a block that only commits, else the plain one
WHILE  turns of a loop, until `loop.again` says no
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language import core

from dlx.graphs.either import Either
from dlx.graphs.loop import Launch
from dlx.ops.op import power_of_two

CHOICE = "_set_commits"  # the kernel that runs before an Either's forward


@core.extern
def _set_conditional(handle, value, _semantic=None):
    # the symbol stays undefined in the cubin; the driver resolves it when it loads the kernel
    types = {(core.dtype("int64"), core.dtype("int32")): ("cudaGraphSetConditional", core.dtype("int32"))}
    return core.extern_elementwise("", "", [handle, value], types, is_pure=False, _semantic=_semantic)


@triton.jit
def _thread():
    """Of a program: more than one that sets a condition is undefined."""
    return tl.inline_asm_elementwise("mov.u32 $0, %tid.x;", "=r", [], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _set_again(handle_ptr, on_ptr, left_ptr, epoch_ptr, halt_ptr, AFTER: tl.constexpr):
    """Tell the WHILE node whether to go on; AFTER a turn there is one forward less."""
    if _thread() == 0:
        left = tl.load(left_ptr)
        if AFTER:
            left -= 1
            tl.store(left_ptr, left)
        wanted = (tl.load(on_ptr) != 0) & (left > 0)
        wanted = wanted & (tl.load(halt_ptr, volatile=True) < tl.load(epoch_ptr))
        _set_conditional(tl.load(handle_ptr), wanted.to(tl.int32))


@triton.jit
def _set_commits(handle_ptr, whole_ptr, done_ptr, B, places, BLOCK: tl.constexpr):
    """Tell the IF node whether a row has a block that only commits."""
    row = tl.arange(0, BLOCK)
    whole = tl.load(whole_ptr + row * places, mask=row < B, other=0).to(tl.int32)
    done = tl.load(done_ptr + row, mask=row < B, other=1).to(tl.int32)
    asked = tl.max(whole & (1 - done), 0)
    if _thread() == 0:
        _set_conditional(tl.load(handle_ptr), asked)


class Nodes:
    """A turn, or a launch of turns, as one graph; `replay` sends it.

    turn           captured with `keep_graph=True`, or an Either of two such; kept alive here, for its memory is in use
    begin, launch  of a loop: what runs before its first turn, captured likewise
    Raises RuntimeError  with the failing call, where the driver or cuda.bindings refuses
    """

    def __init__(
        self,
        turn: torch.cuda.CUDAGraph | Either,
        begin: torch.cuda.CUDAGraph | None = None,
        launch: Launch | None = None,
    ) -> None:
        from cuda.bindings import runtime  # pyright: ignore[reportMissingImports]  (CUDA builds of torch bring it)

        self.rt: Any = runtime
        self.kept: list[object] = [turn, begin, launch]
        self.graph = self._did("cudaGraphCreate", 0)
        self._finally(runtime.cudaGraphDestroy, self.graph)
        if launch is None:
            self._turn(self.graph, turn)
        else:
            raw, handle = self._handle(self.graph)
            told = handle, launch.on, launch.left, launch.epoch, launch.halt
            asked = self._kernel(self.graph, self._child(self.graph, begin), _set_again, *told, False)
            _, (body,) = self._conditional(self.graph, asked, raw, "While", 1)
            self._kernel(body, self._turn(body, turn), _set_again, *told, True)
        self.exec = self._did("cudaGraphInstantiate", self.graph, 0)
        self._finally(runtime.cudaGraphExecDestroy, self.exec)

    def replay(self) -> None:
        """Send the launch on the current stream."""
        self._did("cudaGraphLaunch", self.exec, torch.cuda.current_stream().cuda_stream)

    def _finally(self, destroy: Any, what: Any) -> None:
        weakref.finalize(self, destroy, what).atexit = False  # the driver is gone by then

    def _did(self, name: str, *args: Any) -> Any:
        error, *rest = getattr(self.rt, name)(*args)
        if int(error) != 0:
            raise RuntimeError(f"{name} failed: {error!r}")
        return rest[0] if len(rest) == 1 else tuple(rest)

    def _turn(self, graph: Any, turn: torch.cuda.CUDAGraph | Either) -> Any:
        """A turn as the first nodes of a graph; the last of them."""
        if not isinstance(turn, Either):
            return self._child(graph, turn)
        raw, handle = self._handle(graph)
        B, places = turn.whole.shape
        told = handle, turn.whole, turn.done, B, places, power_of_two(B)
        node, bodies = self._conditional(graph, self._kernel(graph, None, _set_commits, *told), raw, "If", 2)
        for body, part in zip(bodies, (turn.committing, turn.plain), strict=True):  # if true; if not
            self._child(body, part)
        return node

    def _child(self, graph: Any, part: Any) -> Any:
        """A captured part as the first node of a graph."""
        raw = self.rt.cudaGraph_t(int(part.raw_cuda_graph()))
        return self._did("cudaGraphAddChildGraphNode", graph, None, 0, raw)

    def _handle(self, graph: Any) -> tuple[Any, torch.Tensor]:
        """Of a conditional node to come in this graph, which sets it to 0 at each launch; also for kernels to read."""
        raw = self._did("cudaGraphConditionalHandleCreate", graph, 0, 1)
        handle = torch.tensor([int(raw)], dtype=torch.uint64).view(torch.int64).cuda()
        self.kept.append(handle)
        return raw, handle

    def _conditional(self, graph: Any, after: Any, handle: Any, kind: str, size: int) -> tuple[Any, Sequence[Any]]:
        """A node, and its bodies."""
        params = self.rt.cudaGraphNodeParams()
        params.type = self.rt.cudaGraphNodeType.cudaGraphNodeTypeConditional
        params.conditional.handle = handle
        params.conditional.type = getattr(self.rt.cudaGraphConditionalNodeType, f"cudaGraphCondType{kind}")
        params.conditional.size = size
        self.kept.append(params)
        add = "cudaGraphAddNode_v2" if hasattr(self.rt, "cudaGraphAddNode_v2") else "cudaGraphAddNode"  # CUDA 12; 13
        node = self._did(add, graph, [after], None, 1, params)
        return node, params.conditional.phGraph_out[:size]

    def _kernel(self, graph: Any, after: Any, kernel: Any, *args: Any) -> Any:
        """A kernel of one program, captured into a graph behind a node, if any; its node."""
        kernel.warmup(*args, grid=(1,), num_warps=1)._init_handles()  # compiled and loaded before it is captured
        torch.cuda.synchronize()
        stream, behind = torch.cuda.Stream(), [] if after is None else [after]
        there = {int(node) for node in self._nodes(graph)}
        relaxed = self.rt.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        self._did(
            "cudaStreamBeginCaptureToGraph", stream.cuda_stream, graph, behind or None, None, len(behind), relaxed
        )
        try:
            with torch.cuda.stream(stream):
                kernel[(1,)](*args, num_warps=1)
        finally:
            self._did("cudaStreamEndCapture", stream.cuda_stream)
        return next(node for node in self._nodes(graph) if int(node) not in there)

    def _nodes(self, graph: Any) -> Sequence[Any]:
        count = self._did("cudaGraphGetNodes", graph, 0)[1]
        return self._did("cudaGraphGetNodes", graph, count)[0] if count else ()
