"""One value describes one op; its registration and its tests are read from it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

from dlx.environment import environment
from dlx.errors import ShapeError

LIBRARY = torch.library.Library("dlx", "DEF")
DEBUG = environment().debug  # kernels check page indices: none outside the cache is read or written


class Cost(NamedTuple):
    """The least work that any kernel must do: floating-point operations, and bytes moved once."""

    flops: int
    bytes: int


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def launch_options(x: torch.Tensor) -> tuple[bool, dict[str, bool]]:
    """(PDL, launch keywords) of a kernel that calls `gdc_wait` before it reads what another kernel wrote.

    Programmatic dependent launch needs sm_90; a kernel launched with it that does not wait is a race.
    """
    pdl = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    return pdl, {"launch_pdl": True} if pdl else {}


FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
WIDE = (torch.float32, torch.float64)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def need(ok: bool, what: str, value: object, allowed: str) -> None:
    """ShapeError unless ok: "what is value; expected allowed"."""
    if not ok:
        raise ShapeError(f"{what} is {value}; expected {allowed}")


def need_tensor(what: str, x: torch.Tensor, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """ShapeError unless x is contiguous and of this shape (None is any size) and one of these dtypes."""
    fits = x.dim() == len(shape) and all(n is None or n == m for n, m in zip(shape, x.shape, strict=True))
    wanted = "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]"
    need(fits, f"the shape of {what}", list(x.shape), wanted)
    need(x.dtype in dtypes, f"the dtype of {what}", x.dtype, " or ".join(map(str, dtypes)))
    need(
        x.is_contiguous(), f"the strides of {what}", list(x.stride()), "those of a contiguous tensor; use .contiguous()"
    )


def need_fp8(what: str, x: torch.Tensor) -> None:
    """ShapeError if x is e4m3 on a GPU that does not convert it: Triton has no way around the missing instruction."""
    if x.dtype == torch.float8_e4m3fn and x.is_cuda:
        major, minor = torch.cuda.get_device_capability(x.device)
        need((major, minor) >= (8, 9), f"the GPU of {what} in e4m3", f"sm_{major}{minor}", "sm_89 or above; use e5m2")


def processors(x: torch.Tensor) -> int:
    """Multiprocessors of the tensor's GPU; a few where Triton is interpreted."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 8


def shared_limit(x: torch.Tensor) -> int:
    """Bytes of shared memory that a program on the tensor's GPU may take; a launch configuration stays below it.

    227 KiB on sm_90, and where there is no GPU; 99 KiB on sm_86, and on sm_80 too, so that one default serves both.
    """
    if not x.is_cuda:
        return 227 << 10
    gpu = torch.cuda.get_device_properties(x.device)
    sm_90 = torch.cuda.get_device_capability(x.device) >= (9, 0)
    return gpu.shared_memory_per_block_optin if sm_90 else min(gpu.shared_memory_per_block_optin, 99 << 10)


@cache
def locks(device: torch.device) -> torch.Tensor:
    """Zeroed int32 counters of a device that every launch leaves zeroed.

    Launches of one stream share them: engines that launch at the same time from several threads must not.
    """
    return torch.zeros(1 << 16, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Op:
    """An op of the namespace `torch.ops.dlx`: reference on the CPU, Triton kernel on CUDA, opaque to Inductor.

    reference  plain torch, fp32 inside; also the CPU backend
    kernel     launches Triton; same signature
    fake       shapes, dtypes and strides of the result, nothing else
    check      raises ShapeError for arguments that the kernel cannot take, before anything is launched
    cases      name → arguments, small enough for Triton's interpreter
    cost       least work for given arguments
    mutates    names of the arguments written to
    wide       names of the matrices that are fp32 whatever the case's dtype
    rtol, atol how far the kernel in the case's dtype may be from the reference in fp64
    """

    name: str
    reference: Callable[..., Any]
    kernel: Callable[..., Any]
    fake: Callable[..., Any]
    check: Callable[..., None]
    cases: Callable[[], dict[str, tuple[Any, ...]]]
    cost: Callable[..., Cost]
    mutates: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()
    rtol: float = 0.0
    atol: float = 0.0

    def __post_init__(self) -> None:
        # infer_schema wants types, not the strings that postponed evaluation leaves
        self.reference.__annotations__ = inspect.get_annotations(self.reference, eval_str=True)
        LIBRARY.define(self.name + torch.library.infer_schema(self.reference, mutates_args=self.mutates))
        LIBRARY.impl(self.name, self._checked(self.kernel), "CUDA")
        LIBRARY.impl(self.name, self._checked(self.reference), "CPU")
        torch.library.register_fake(f"dlx::{self.name}", self.fake, lib=LIBRARY)

    def _checked(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*args: Any) -> Any:
            self.check(*args)
            return run(*args)

        return checked

    def __call__(self, *args: Any) -> Any:
        return getattr(torch.ops.dlx, self.name)(*args)
