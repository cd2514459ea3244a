"""The official client of OpenAI against a real model: what it asks for is what it gets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from dlx import LLM, SamplingParams
from dlx.async_engine import AsyncEngine
from dlx.config import Config
from tests.families import network, write
from tests.serve.served import Served

QUESTION = [{"role": "user", "content": "Sort these numbers in ascending order: 31, 7, 90, 12"}]
UNKNOWN = [{"role": "user", "content": "Qwerty asdf zxcv?"}]  # of no task, so draws differ
TEXT = "<|im_start|>user\nCompute (12 + 7) * 3 - 5.<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def client(model: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{model.url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def test_a_chat_is_answered_as_by_the_embedding_api(client: openai.OpenAI, nano_llm: LLM) -> None:
    (expected,) = nano_llm.generate(QUESTION, SamplingParams(max_tokens=64))
    reply = client.chat.completions.create(model="nano", messages=QUESTION, max_completion_tokens=64)
    (choice,) = reply.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert (choice.finish_reason, choice.dlx["finish_detail"]) == ("stop", "eos")
    assert reply.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert reply.usage.completion_tokens == expected.tokens
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + expected.tokens
    assert (choice.dlx["nfe"], reply.usage.dlx["nfe"]) == (expected.nfe, expected.nfe)
    assert reply.usage.dlx["tokens_per_forward"] == pytest.approx(expected.tokens_per_forward, abs=1e-3)


def test_texts_and_token_ids_are_completed_in_their_order(client: openai.OpenAI, nano_llm: LLM) -> None:
    ids = nano_llm.tokenizer.encode(TEXT)
    other = nano_llm.tokenizer.chat(QUESTION)
    expected = [o.text for o in nano_llm.generate([ids, other], SamplingParams(max_tokens=48))]
    for prompt in ([ids, other], [TEXT, nano_llm.tokenizer.decode([]) + _written(QUESTION)]):
        reply = client.completions.create(model="nano", prompt=prompt, max_tokens=48)
        assert [choice.text for choice in reply.choices] == expected
        assert [choice.index for choice in reply.choices] == [0, 1]
    assert client.completions.create(model="nano", prompt=ids, max_tokens=48).choices[0].text == expected[0]
    assert client.completions.create(model="nano", prompt=TEXT, max_tokens=48).choices[0].text == expected[0]


def _written(messages: list[dict[str, str]]) -> str:
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages) + "<|im_start|>assistant\n"


@pytest.mark.parametrize("extra", [{}, {"stop": ["9"]}, {"max_tokens": 5}, {"temperature": 1.5, "seed": 3}])
def test_deltas_join_to_the_text_that_is_not_streamed(client: openai.OpenAI, extra: dict[str, object]) -> None:
    asked = {"model": "nano", "messages": QUESTION, "max_tokens": 64, **extra}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(deltas).encode() == whole.choices[0].message.content.encode()
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_completions_stream_too(client: openai.OpenAI) -> None:
    asked = {"model": "nano", "prompt": TEXT, "max_tokens": 48}
    whole = client.completions.create(**asked).choices[0].text
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)) == whole


def test_usage_gets_a_chunk_of_its_own_where_it_is_asked_for(client: openai.OpenAI) -> None:
    options = {"include_usage": True}
    asked = {"model": "nano", "messages": QUESTION, "max_tokens": 32, "stream": True, "stream_options": options}
    *body, last = client.chat.completions.create(**asked)
    assert last.choices == [] and last.usage.completion_tokens > 0
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in body)


def test_choices_have_the_seeds_that_follow_the_first(client: openai.OpenAI) -> None:
    asked = {"model": "nano", "messages": UNKNOWN, "max_tokens": 12, "temperature": 2.0}
    many = client.chat.completions.create(**asked, n=2, seed=11)
    each = [client.chat.completions.create(**asked, seed=11 + i).choices[0].message.content for i in range(2)]
    assert [choice.message.content for choice in many.choices] == each
    assert len(set(each)) == 2
    streamed = ["", ""]
    for chunk in client.chat.completions.create(**asked, n=2, seed=11, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == each


def test_a_stop_string_ends_an_answer_and_is_cut_from_it(client: openai.OpenAI) -> None:
    asked = {"model": "nano", "messages": QUESTION, "max_tokens": 64}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    stop = whole[len(whole) // 2 :][:2]
    cut = client.chat.completions.create(**asked, stop=stop).choices[0]
    assert cut.message.content == whole[: whole.index(stop)]
    assert (cut.finish_reason, cut.dlx["finish_detail"], cut.dlx["stop"]) == ("stop", "stop_string", stop)


def test_max_tokens_is_kept_to_the_token(client: openai.OpenAI) -> None:
    for most in (1, 15, 16, 17):
        extra = {"dlx": {"ignore_eos": True}}
        reply = client.chat.completions.create(model="nano", messages=QUESTION, max_tokens=most, extra_body=extra)
        assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (most, "length")


def test_thresholds_are_a_request_s_own(client: openai.OpenAI) -> None:
    def forwards(**own: object) -> int:
        asked = {"model": "nano", "messages": QUESTION, "max_tokens": 32}
        return client.chat.completions.create(**asked, extra_body={"dlx": own}).choices[0].dlx["nfe"]

    assert forwards(threshold=0.0) < forwards(threshold=0.9) < forwards(threshold=1.0)
    assert forwards(max_nfe=2) == 2


def test_a_client_that_leaves_a_stream_ends_its_request(client: openai.OpenAI, model: Served) -> None:
    extra = {"dlx": {"ignore_eos": True, "threshold": 1.0}}
    asked = {"model": "nano", "messages": QUESTION, "max_tokens": 1500, "stream": True, "extra_body": extra}
    before = model.inside(model.engine.stats).finished.get("abort", 0)
    with client.chat.completions.create(**asked) as stream:
        next(iter(stream))
    model.until(lambda: model.engine.stats().finished.get("abort", 0) == before + 1)
    stats = model.inside(model.engine.stats)
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)


def test_models_are_listed_with_what_they_decode_with(client: openai.OpenAI) -> None:
    (listed,) = client.models.list().data
    assert (listed.id, listed.max_model_len, listed.dlx["policy"], listed.dlx["block_length"]) == (
        "nano",
        2048,
        "single_bd",
        16,
    )
    assert client.models.retrieve("nano").id == "nano"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'") as caught:
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("policy", ["low_confidence", "d2f"])
def test_what_is_fixed_stands_in_the_answer_and_the_gaps_are_filled(policy: str, tmp_path: Path) -> None:
    write(tmp_path, "llada", network("llada"))
    config = Config.from_args(tmp_path, policy=policy, graphs="off", device="cpu", max_num_seqs=1)
    with (
        Served(AsyncEngine(config), {"llada": None}) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0) as client,
    ):
        own = {"fixed": [[0, 9], [3, 11], [7, 12]], "ignore_eos": True}
        reply = client.completions.create(model="llada", prompt=[5, 6, 7], max_tokens=8, extra_body={"dlx": own})
    words = reply.choices[0].text.split()
    assert (len(words), words[0], words[3], words[7]) == (8, "w9", "w11", "w12")
    assert "[MASK]" not in reply.choices[0].text
