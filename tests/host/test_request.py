"""Sampling parameters are refused outside their ranges, by name, with the range that is allowed."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from dlx.errors import RequestError
from dlx.request import Finish, Output, SamplingParams, Timings

NAN, INF = float("nan"), float("inf")
IDS = "an integer from 0 to 2147483647"
GOOD: dict[str, list[Any]] = {
    "max_tokens": [1, 256, 2**31 - 1],
    "temperature": [0, 0.0, 0.01, 1, 100.0],
    "seed": [None, 0, 1, 2**63 - 1],
    "threshold": [None, 0, 0.0, 0.9, 1, 1.0],
    "open_at": [None, 0.0, 0.1, 1.0],
    "force_at": [None, 0.0, 0.9, 1.0],
    "max_nfe": [None, 1, 2**31 - 1],
    "max_repetition_run": [None, 2, 2**31 - 1],
    "ignore_eos": [True, False],
    "stop_token_ids": [(), (0,), (5, 6), [7], (2**31 - 1,)],
}
BAD: dict[str, tuple[str, list[Any]]] = {
    "max_tokens": ("an integer from 1 to 2147483647", [0, -1, 2**31, 1.0, NAN, "8", None, True, [1]]),
    "temperature": ("from 0 to 100", [-0.1, 100.1, NAN, INF, -INF, 10**400, "0", None, True, False, [0]]),
    "seed": ("an integer from 0 to 9223372036854775807", [-1, 2**63, 0.0, NAN, "0", True, False]),
    "threshold": ("a number from 0 to 1", [-0.001, 1.001, 90, NAN, INF, "0.9", True, [0.9]]),
    "open_at": ("a number from 0 to 1", [-0.001, 1.001, NAN, -INF, "1", False]),
    "force_at": ("a number from 0 to 1", [-0.001, 1.001, NAN, INF, "1", True]),
    "max_nfe": ("an integer from 1 to 2147483647", [0, -5, 2**31, 2.0, INF, "1", True]),
    "max_repetition_run": ("an integer from 2 to 2147483647", [0, 1, -5, 2**31, 2.0, INF, "2", True]),
    "ignore_eos": ("pass True or False", [0, 1, None, "no", 0.0]),
}
CASES = [(name, value, allowed) for name, (allowed, values) in BAD.items() for value in values]


def refusal(params: SamplingParams) -> str:
    with pytest.raises(RequestError) as caught:
        params.check()
    return str(caught.value)


def test_an_offset_is_fixed_once() -> None:
    assert "fixed has an offset twice" in refusal(SamplingParams(fixed=((0, 5), (0, 6))))


def test_the_defaults_are_allowed() -> None:
    SamplingParams().check()


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in GOOD for value in GOOD[name]])
def test_the_ends_of_every_range_are_allowed(name: str, value: object) -> None:
    SamplingParams(**{name: value}).check()  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "value", "allowed"), CASES, ids=[f"{n}={str(v)[:8]}" for n, v, _ in CASES])
def test_what_is_outside_its_range_is_named_with_the_range(name: str, value: object, allowed: str) -> None:
    message = refusal(SamplingParams(**{name: value}))  # type: ignore[arg-type]
    assert message.startswith(f"{name}={value!r} is not")
    assert allowed in message


@pytest.mark.parametrize("value", [1e-45, 1e-40, 1e-38])
def test_a_temperature_at_which_logits_overflow_is_refused(value: float) -> None:
    assert refusal(SamplingParams(temperature=value)).startswith(f"temperature={value!r} is not allowed")


@pytest.mark.parametrize("stop", [-1, 2**31, 1.0, NAN, "2", None, True])
def test_a_stop_id_that_is_none_is_named_wherever_it_stands(stop: object) -> None:
    for ids in ((stop,), (5, stop), [5, 6, stop]):
        message = refusal(SamplingParams(stop_token_ids=ids))  # type: ignore[arg-type]
        assert message == f"stop_token_ids={stop!r} is not allowed; pass {IDS}"


@pytest.mark.parametrize("ids", [5, None, 1.5, "12"])
def test_stop_ids_that_are_no_list_are_refused(ids: object) -> None:
    assert refusal(SamplingParams(stop_token_ids=ids)).startswith("stop_token_ids=")  # type: ignore[arg-type]


def test_the_first_wrong_value_is_named_alone() -> None:
    message = refusal(SamplingParams(max_tokens=0, threshold=2.0))
    assert "max_tokens=0" in message
    assert "threshold" not in message


def test_parameters_are_values_that_do_not_change() -> None:
    params = SamplingParams(threshold=0.5)
    with pytest.raises(FrozenInstanceError):
        params.threshold = 0.6  # type: ignore[misc]
    assert replace(params, threshold=0.6) == SamplingParams(threshold=0.6)
    assert params == SamplingParams(threshold=0.5)


def test_a_finish_is_its_word() -> None:
    assert list(Finish) == ["stop", "length", "max_nfe", "repetition", "error", "abort", "timeout"]


@pytest.mark.parametrize(("tokens", "nfe", "expected"), [(12, 4, 3.0), (1, 2, 0.5), (0, 0, 0.0)])
def test_tokens_per_forward_counts_denoise_forwards_alone(tokens: int, nfe: int, expected: float) -> None:
    times = Timings(0.0, 0.1, 0.2)
    output = Output(0, [5], "", [], Finish.STOP, tokens, nfe, prefill_forwards=7, timings=times)
    assert output.tokens_per_forward == expected
