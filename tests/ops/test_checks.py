"""An op refuses what its kernel cannot take, before anything is launched, and names the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dlx.errors import ShapeError
from dlx.ops import OPS


def wider(x: Tensor) -> Tensor:
    return torch.zeros(*x.shape[:-1], x.shape[-1] + 1, dtype=x.dtype)


def strided(x: Tensor) -> Tensor:
    return torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)[..., ::2]


def long(x: Tensor) -> Tensor:
    return x.long()


def half(x: Tensor) -> Tensor:
    return x.half()


BREAKS: list[tuple[str, str, Callable[[Tensor], Tensor], str]] = [
    ("attention", "q", strided, "strides of attention's q"),
    ("attention", "q", half, "dtype of attention's kv"),
    ("attention", "kv", wider, "shape of attention's kv"),
    ("attention", "kv", lambda kv: torch.zeros(*kv.shape[:3], 4, kv.shape[4]), "key heads for 6 heads is 4"),
    ("attention", "pages", long, "dtype of attention's pages"),
    ("attention", "seen", wider, "shape of attention's seen"),
    ("kv_store", "qkv", strided, "strides of kv_store's qkv"),
    ("kv_store", "k_gain", wider, "shape of kv_store's k_gain"),
    ("kv_store", "pos", long, "dtype of kv_store's pos"),
    ("kv_store", "frequencies", half, "dtype of kv_store's frequencies"),
    ("candidates", "head", wider, "shape of candidates' head"),
    ("candidates", "head", strided, "strides of candidates' head"),
    ("candidates", "seed", lambda x: x.int(), "dtype of candidates' seed"),
    ("project", "weight", strided, "strides of project's weight"),
    ("project", "squares", wider, "shape of project's squares"),
    ("project", "a", lambda a: torch.zeros(257, a.shape[1]), "number of rows is 257"),
    ("accumulate", "h", wider, "shape of accumulate's h"),
    ("accumulate", "weight", half, "dtype of accumulate's weight"),
    ("positions", "open", long, "dtype of positions' open"),
    ("route", "weight", strided, "strides of route's weight"),
    ("route", "weight", half, "dtype of route's weight"),
    ("experts", "ids", long, "dtype of experts' ids"),
    ("experts", "down", wider, "shape of experts' down"),
]


@pytest.mark.parametrize(
    ("op", "argument", "broken", "message"), BREAKS, ids=[f"{b[0]} {b[1]} {i}" for i, b in enumerate(BREAKS)]
)
def test_a_wrong_argument_is_named(op: str, argument: str, broken: Callable[[Tensor], Tensor], message: str) -> None:
    args: list[Any] = list(next(iter(OPS[op].cases().values())))
    at = list(OPS[op].reference.__annotations__).index(argument)
    args[at] = broken(args[at])
    with pytest.raises(ShapeError, match=message):
        OPS[op](*args)


def test_a_vocabulary_wider_than_the_head_is_refused() -> None:
    args = list(OPS["candidates"].cases()["greedy"])
    with pytest.raises(ShapeError, match="candidates' vocab is 321; expected 2 to the 320 rows of the head"):
        OPS["candidates"](*args[:-1], 321)
