"""Stop strings: an answer is cut at the first that is complete, however its ids arrive, and nothing is taken back."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from dlx import LLM, RequestError, SamplingParams
from dlx.answer import Answer, Piece
from dlx.request import Finish
from dlx.tokenizer import TextStream, Tokenizer

PROMPT = [{"role": "user", "content": "Sort these numbers in ascending order: 31, 7, 90, 12"}]


class Letters(TextStream):
    """Ids are code points."""

    def __init__(self) -> None: ...

    def add(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def flush(self) -> str:
        return ""


def fed(text: str, stops: Sequence[str], cuts: Sequence[int]) -> tuple[Answer, list[Piece]]:
    """An answer that is given a text in pieces, up to the one that ends it."""
    answer = Answer(Letters(), stops)
    pieces: list[Piece] = []
    for a, b in pairwise([0, *cuts, len(text)]):
        pieces.append(answer.add(list(map(ord, text[a:b])), last=b == len(text)))
        if pieces[-1].stop is not None:
            break
    return answer, pieces


def expected(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """The text cut at the stop string that is complete first, character by character."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


@pytest.mark.parametrize("seed", range(200))
def test_a_stop_string_cuts_alike_wherever_the_blocks_end(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choices("ab", k=24))
    stops = ["".join(rng.choices("ab", k=rng.randint(1, 6))) for _ in range(rng.randint(1, 4))]
    cuts = sorted(rng.sample(range(1, 24), rng.randint(0, 8)))
    answer, pieces = fed(text, stops, cuts)
    assert (answer.text, pieces[-1].stop) == expected(text, stops)
    assert "".join(piece.text for piece in pieces) == answer.text


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    _, pieces = fed("one EN two", ["END"], [3, 6])
    assert [piece.text for piece in pieces] == ["one", " ", "EN two"]


def test_ids_behind_the_one_that_completes_a_stop_string_do_not_count() -> None:
    _, (piece,) = fed("abcdef", ["cd"], [])
    assert piece == Piece("ab", [97, 98, 99, 100], "cd")


@pytest.fixture(scope="module", params=["single_bd", "multi_bd"])
def model(request: pytest.FixtureRequest, tiny: Path) -> Iterator[LLM]:
    """The bundled model, by either policy."""
    with LLM(tiny, policy=request.param, graphs="off", device="cpu", max_num_seqs=2) as llm:
        yield llm


def test_a_stop_string_ends_a_request_and_frees_its_pages_at_once(model: LLM) -> None:
    (whole,) = model.generate(PROMPT, SamplingParams(max_tokens=64))
    middle = whole.text[len(whole.text) // 2 :][:3]
    chunks = list(model.stream(PROMPT, SamplingParams(max_tokens=64, stop=(middle, "never"))))
    output = chunks[-1].output
    assert output is not None
    assert output.text == "".join(chunk.text for chunk in chunks) == whole.text[: whole.text.index(middle)]
    assert (output.finish_reason, output.stop) == (Finish.STOP, middle)
    assert output.token_ids == whole.token_ids[: output.tokens]
    assert middle in model.tokenizer.decode(output.token_ids)
    assert middle not in model.tokenizer.decode(output.token_ids[:-1])
    pool = model.engine.scheduler.pool
    pool.check_invariants()
    assert model.engine.idle and pool.free == pool.total and bool(model.engine.worker.buf.done.all())


def test_others_of_the_batch_go_on_behind_a_stop_string(model: LLM) -> None:
    (whole,) = model.generate(PROMPT, SamplingParams(max_tokens=64))
    params = [SamplingParams(max_tokens=64, stop=(whole.text[2:4],)), SamplingParams(max_tokens=64)]
    cut, same = model.generate([PROMPT, PROMPT], params)
    assert cut.text == whole.text[: whole.text.index(whole.text[2:4])]
    assert (same.text, same.stop) == (whole.text, None)


@pytest.mark.parametrize("stop", [("",), ("a",) * 5, ("x" * 257,), (3,), "abc"])
def test_a_stop_string_that_is_empty_long_or_none_is_refused(stop: object) -> None:
    with pytest.raises(RequestError, match="stop"):
        SamplingParams(stop=stop).check()  # type: ignore[arg-type]


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(tiny: Path) -> None:
    tokenizer = Tokenizer.load(tiny)
    assert len(tokenizer.encode("ab " * 8, most=24)) <= 24
    with pytest.raises(RequestError, match="at most 24 are allowed"):
        tokenizer.encode("ab " * 32, most=24)
    with pytest.raises(RequestError, match="a text of 4194304 characters has more than 24 tokens"):
        tokenizer.encode("x" * 2**22, most=24)
