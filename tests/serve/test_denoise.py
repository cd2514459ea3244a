"""stream_mode: "denoise": what is committed joins to the answer, and what is not is told with its masks."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from dlx import cli
from dlx.config import Config
from dlx.request import Chunk
from dlx.serve.denoise import Denoise, Words
from dlx.serve.replies import Head
from dlx.tokenizer import Tokenizer
from tests.serve.served import Served

ASKED = "Sort 3 2 1:"
PROMPT = f"<|im_start|>user\n{ASKED}<|im_end|>\n<|im_start|>assistant\n"
MASK = 3


@pytest.fixture(scope="module")
def watched(nano: Path) -> Iterator[Served]:
    """A server over the nano model that keeps confidences."""
    from dlx.async_engine import AsyncEngine

    engine = AsyncEngine(Config.from_args(nano, graphs="off", device="cpu", max_num_seqs=4, watch=True))
    with Served(engine) as served:
        yield served


def events(served: Served, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
    """The events of a denoise stream; the last one is [DONE]."""
    asked = {"prompt": PROMPT, "max_tokens": 40, "stream": True, "stream_mode": "denoise", "ignore_eos": True} | body
    reply = served.client.post(path, json={name: value for name, value in asked.items() if value is not None})
    assert reply.status_code == 200, reply.text
    *told, done = reply.text.removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in told]


def plain(served: Served, **body: Any) -> dict[str, Any]:
    asked = {"prompt": PROMPT, "max_tokens": 40, "ignore_eos": True} | body
    return served.client.post("/v1/completions", json=asked).json()


def text_of(told: list[dict[str, Any]]) -> str:
    return "".join(choice.get("text") or "" for event in told for choice in event["choices"])


def blocks(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event["dlx"]["block"] for event in told if event["type"] == "provisional"]


@pytest.mark.parametrize("threshold", [0.5, 0.9, 1.0])
def test_committed_text_joins_to_the_answer_of_a_plain_request(watched: Served, threshold: float) -> None:
    own = {"dlx": {"threshold": threshold}}
    told = events(watched, **own)
    assert text_of(told) == plain(watched, **own)["choices"][0]["text"] != ""
    assert bool(blocks(told)) or threshold < 1.0
    assert {event["type"] for event in told} <= {"committed", "provisional"}


def test_a_conversation_is_told_of_in_deltas(watched: Served) -> None:
    messages = [{"role": "user", "content": ASKED}]
    told = events(watched, "/v1/chat/completions", prompt=None, messages=messages, dlx={"threshold": 1.0})
    asked = {"messages": messages, "max_tokens": 40, "ignore_eos": True, "dlx": {"threshold": 1.0}}
    reply = watched.client.post("/v1/chat/completions", json=asked).json()
    deltas = [choice["delta"].get("content") or "" for event in told for choice in event["choices"]]
    assert "".join(deltas) == reply["choices"][0]["message"]["content"]
    assert blocks(told)


def test_figures_only_grow_and_end_as_the_usage_says(watched: Served) -> None:
    told = events(watched, dlx={"threshold": 1.0})
    figures = [(event["dlx"]["nfe"], event["dlx"]["tokens"]) for event in told]
    assert figures == sorted(figures)
    usage = told[-1]["usage"]
    assert figures[-1] == (usage["dlx"]["nfe"], usage["completion_tokens"])


def test_a_block_begins_behind_what_is_committed_and_its_decided_tokens_stay(watched: Served) -> None:
    told = events(watched, dlx={"threshold": 1.0})
    ids: dict[int, int] = {}
    masks = 0
    for event in told:
        if event["type"] == "committed":
            continue
        block = event["dlx"]["block"]
        assert block["token_offset"] == event["dlx"]["tokens"]
        assert block["masked"] == [id == MASK for id in block["token_ids"]]
        for at, id in enumerate(block["token_ids"], block["token_offset"]):
            masks += id == MASK
            assert id == MASK or ids.setdefault(at, id) == id
    assert masks > 100
    assert len(ids) > 30


def test_a_block_tells_texts_guesses_and_confidences_of_each_position(watched: Served, nano: Path) -> None:
    decode = Tokenizer.load(nano).decode
    for block in blocks(events(watched, dlx={"threshold": 1.0})):
        n = len(block["token_ids"])
        assert all(len(block[name]) == n for name in ("text", "masked", "confidence", "guess_ids", "guess_text"))
        assert all(0 < p <= 1 for p in block["confidence"])
        for text, masked, guess, id in zip(block["text"], block["masked"], block["guess_ids"], block["token_ids"]):
            assert text == "" if masked else guess == id
        run = [id for id in block["token_ids"] if id != MASK]
        if not any(block["masked"][: len(run)]):
            assert "".join(block["text"]) == decode(run)


def test_without_watch_blocks_have_masks_and_no_confidences(model: Served) -> None:
    some = blocks(events(model, dlx={"threshold": 1.0}))
    assert some
    assert all(set(block) == {"token_offset", "token_ids", "text", "masked"} for block in some)


def test_a_stop_string_cuts_the_committed_text(watched: Served) -> None:
    whole = plain(watched)["choices"][0]["text"]
    stop = whole[len(whole) // 2 :][:3]
    told = events(watched, stop=stop)
    assert text_of(told) == whole[: whole.index(stop)]
    assert told[-1]["choices"][0]["finish_reason"] == "stop"


def test_the_official_client_reads_it_as_a_stream_of_deltas(watched: Served) -> None:
    client = OpenAI(base_url=f"{watched.url}/v1", api_key="none", max_retries=0)
    extra = {"stream_mode": "denoise", "ignore_eos": True}
    asked: Any = {"model": "nano", "messages": [{"role": "user", "content": ASKED}], "max_tokens": 40}
    with client.chat.completions.create(**asked, stream=True, extra_body=extra) as stream:
        text = "".join(part.choices[0].delta.content or "" for part in stream if part.choices)
    whole = client.chat.completions.create(**asked, extra_body={"ignore_eos": True})
    client.close()
    assert text == whole.choices[0].message.content != ""


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"n": 2}, "one choice"),
        ({"prompt": ["a", "b"]}, "one choice"),
        ({"stream": False}, "stream=true"),
        ({"stream_mode": "snapshots"}, "stream_mode"),
    ],
)
def test_what_it_cannot_tell_of_is_refused(watched: Served, body: dict[str, Any], said: str) -> None:
    asked = {"prompt": PROMPT, "stream": True, "stream_mode": "denoise"} | body
    reply = watched.client.post("/v1/completions", json=asked)
    assert reply.status_code == 400
    assert said in reply.json()["error"]["message"]
    assert reply.json()["error"]["param"] == "stream_mode"


def test_committed_streams_say_nothing_of_blocks(watched: Served) -> None:
    told = events(watched, stream_mode="committed")
    assert all("type" not in event and "dlx" not in event for event in told)


def test_chunks_that_were_joined_for_a_slow_reader_tell_all_text_and_the_newest_block(nano: Path) -> None:
    """What a ticket makes of chunks that wait: texts joined, the last window."""
    encoder = Denoise(Head("x", "text_completion", 0, "nano"), False, Tokenizer.load(nano), MASK)
    joined = Chunk(0, "one two", [70, 71, 72], None, [MASK, 73], None, None, [0.25, 0.5], [74, 73], 9)
    first, second = encoder.chunk(0, joined).decode().removesuffix("\n\n").split("\n\n")
    committed, provisional = (json.loads(event.removeprefix("data: ")) for event in (first, second))
    assert (committed["type"], committed["choices"][0]["text"]) == ("committed", "one two")
    assert provisional["dlx"]["block"]["token_offset"] == provisional["dlx"]["tokens"] == 3
    assert provisional["dlx"]["nfe"] == 9
    assert provisional["dlx"]["block"]["guess_ids"] == [74, 73]


def test_a_character_of_several_tokens_stands_at_its_first(nano: Path) -> None:
    tokenizer = Tokenizer.load(nano)
    ids = tokenizer.encode("a🎈 b", plain=True)
    words = Words(tokenizer.decode, MASK)
    texts = words.each(ids)
    assert "".join(texts) == "a🎈 b"
    assert "🎈" in texts
    assert len(texts) == len(ids) > 4


def test_masks_part_the_runs_that_are_read_together(nano: Path) -> None:
    tokenizer = Tokenizer.load(nano)
    balloon = tokenizer.encode("🎈", plain=True)
    texts = Words(tokenizer.decode, MASK).each([*balloon[:2], MASK, *balloon])
    assert texts[2] == ""
    assert texts[3] == "🎈"


def test_the_lines_of_the_page_run_as_written(watched: Served, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "page.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(block.replace("http://127.0.0.1:8000", watched.url), "page.md", "exec", dont_inherit=True), {})
    lines = capsys.readouterr().out.splitlines()
    messages = [{"role": "user", "content": "What is 19 * 27?"}]
    reply = watched.client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 48}).json()
    shown = "".join(ast.literal_eval(line.removeprefix("= ")) for line in lines if line.startswith("= "))
    assert shown == reply["choices"][0]["message"]["content"] != ""
    assert any(line.startswith("? ") and "░" in line for line in lines)


def test_serve_watches_the_bundled_model_unless_told_otherwise(nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched: list[bool] = []

    def serve(config: Config, options: object, told: object) -> int:
        watched.append(config.watch)
        return 0

    monkeypatch.setattr("dlx.serve.run.serve", serve)
    lines = (["serve"], ["serve", "--no-watch"], ["serve", str(nano)], ["serve", str(nano), "--watch"])
    assert [cli.main([*line, "--device", "cpu"]) for line in lines] == [0, 0, 0, 0]
    assert watched == [True, False, False, True]
