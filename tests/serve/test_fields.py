"""Fields of a request: what is out of range, of another type or not supported is refused by its name, before any work.

Each case bears the number that it has in docs/faults.md.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest

from dlx.errors import RequestError
from dlx.tokenizer import Tokenizer
from tests.serve.fake import FakeEngine
from tests.serve.served import Served
from tests.serve.test_bodies import HELLO, refused

HUGE = 10**9
REFUSED = [
    (15, "n", "3"),
    (15, "n", True),
    (15, "n", 1.0),
    (15, "max_tokens", 5.0),
    (15, "stream", 1),
    (15, "stream", "true"),
    (19, "temperature", -1),
    (19, "temperature", 1e9),
    (19, "temperature", "0.5"),
    (21, "top_p", 0),
    (21, "top_p", 1.0001),
    (21, "top_k", -2),
    (21, "top_k", 2**31),
    (22, "max_tokens", 0),
    (22, "max_tokens", -1),
    (22, "max_tokens", 2**31),
    (22, "max_tokens", 2**63),
    (22, "max_tokens", "12"),
    (22, "max_completion_tokens", 0),
    (24, "n", 0),
    (24, "n", 9),
    (24, "n", HUGE),
    (25, "stop", ""),
    (25, "stop", ["a"] * 1000),
    (25, "stop", "x" * (1 << 20)),
    (25, "stop", [3]),
    (25, "stop", {"a": 1}),
    (31, "dlx.threshold", 1.01),
    (31, "dlx.threshold", -0.5),
    (32, "dlx.max_nfe", 0),
    (34, "dlx.block_length", 5),
    (34, "dlx.policy", "multi_bd"),
    (36, "logprobs", True),
    (36, "top_logprobs", 3),
    (36, "prompt_logprobs", 1),
    (36, "response_format", {"type": "json_object"}),
    (36, "tools", [{"type": "function", "function": {"name": "f"}}]),
    (36, "tool_choice", "required"),
    (36, "logit_bias", {"5": -100}),
    (36, "presence_penalty", 0.5),
    (36, "frequency_penalty", -0.5),
    (36, "repetition_penalty", 1.1),
    (36, "min_p", 0.1),
    (36, "echo", True),
    (36, "suffix", "b"),
    (36, "best_of", 2),
    (37, "seed", -1),
    (37, "seed", 2**64),
    (37, "seed", 1.5),
    (38, "dlx.fixed", [[0]]),
    (38, "dlx.fixed", [[-1, 5]]),
    (38, "dlx.fixed", "ab"),
    (48, "chat_template", "{{ messages }}"),
    (48, "chat_template_kwargs", {"a": 1}),
    (48, "messages", [{"role": "wizard", "content": "a"}]),
    (49, "messages", [{"role": "user", "content": "a"}] * 10_000),
    (39, "messages", []),
    (39, "messages", [{"role": "user"}]),
    (39, "messages", [{"role": "user", "content": None}]),
    (39, "messages", "Hello"),
]


def nested(name: str, value: object) -> dict[str, object]:
    outer, _, inner = name.partition(".")
    return {outer: {inner: value}} if inner else {outer: value}


@pytest.mark.parametrize(("case", "name", "value"), REFUSED, ids=lambda x: ascii(x)[:24])
def test_a_field_that_is_not_allowed_is_refused_by_name(fake: Served, case: int, name: str, value: object) -> None:
    error = refused(fake.client.post("/v1/chat/completions", json={"messages": HELLO, **nested(name, value)}))
    assert error["param"].split("[")[0].startswith(name)
    assert error["code"] in ("invalid_value", "unsupported_parameter", "context_length_exceeded")
    assert (error["code"] == "unsupported_parameter") == (case in (36, 48) and name != "messages")
    assert fake.engine.asked == []


NEUTRAL = {
    "n": 1,
    "stop": [],
    "top_k": -1,
    "top_p": 1,
    "logprobs": False,
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "presence_penalty": 0.0,
    "frequency_penalty": 0,
    "repetition_penalty": 1.0,
    "logit_bias": {},
    "best_of": 1,
    "dlx": {"policy": "single_bd", "threshold": None},
    "seed": None,
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_value_that_asks_for_nothing_is_allowed(fake: Served, name: str) -> None:  # cases 21 and 36
    response = fake.client.post("/v1/chat/completions", json={"messages": HELLO, name: NEUTRAL[name]})
    assert response.is_success and "x-dlx-warning" not in response.headers


CONTENT = [([], "content", "at least 1 item"), ([{"type": "image_url"}], "content[0].type", "'text'")]


@pytest.mark.parametrize(("content", "at", "why"), CONTENT)
def test_what_is_wrong_with_a_list_is_told_of_the_list(fake: Served, content: object, at: str, why: str) -> None:
    body = {"messages": [{"role": "user", "content": content}]}
    error = refused(fake.client.post("/v1/chat/completions", json=body))
    assert error["param"] == f"messages[0].{at}" and why in error["message"]


def test_too_many_stop_strings_are_told_with_how_many_may_be(fake: Served) -> None:  # case 25
    error = refused(fake.client.post("/v1/completions", json={"prompt": "a", "stop": list("abcde")}))
    assert error["param"] == "stop" and "at most 4" in error["message"]


def test_fields_reach_the_engine(fake: Served) -> None:
    own = {"threshold": 0.5, "open_at": 0.25, "force_at": 1, "max_nfe": 9, "priority": -3, "cache_salt": "s"}
    asked = {"temperature": 0.5, "seed": 7, "n": 2, "max_tokens": 5, "stop": ["a", "b"], "stop_token_ids": [9]}
    assert fake.client.post(
        "/v1/completions", json={"prompt": "a", **asked, "dlx": own | {"ignore_eos": True}}
    ).is_success
    first, second = fake.engine.asked
    assert (first.seed, second.seed) == (7, 8)
    assert {name: getattr(first, name) for name in own} == own
    assert (first.temperature, first.max_tokens, first.stop, first.stop_token_ids) == (0.5, 5, ("a", "b"), (9,))
    assert first.ignore_eos


def test_a_temperature_that_is_nearly_0_is_0(fake: Served) -> None:  # case 20
    assert fake.client.post("/v1/completions", json={"prompt": "a", "temperature": 1e-9}).is_success
    assert fake.engine.asked[0].temperature == 0.0


def test_filters_need_a_policy_that_has_them(fake: Served) -> None:  # case 21
    for name, value in (("top_p", 0.5), ("top_k", 5)):
        assert "filters" in refused(fake.client.post("/v1/completions", json={"prompt": "a", name: value}))["message"]


PROMPTS: list[tuple[int, Any]] = [
    (39, ""),
    (39, []),
    (39, [[]]),
    (39, ["a", ""]),
    (43, [-1]),
    (43, [320]),
    (43, [2**31]),
    (43, [2**63]),
    (43, [1.5]),
    (43, [True]),
    (43, [[1, "a"]]),
    (43, [[[1]]]),
    (43, [1, "a"]),
    (43, {"a": 1}),
    (43, None),
    (44, [5, 3]),  # the mask
]


@pytest.mark.parametrize(("case", "prompt"), PROMPTS, ids=ascii)
def test_a_prompt_that_is_no_prompt_is_refused(fake: Served, case: int, prompt: object) -> None:
    refused(fake.client.post("/v1/completions", json={"prompt": prompt}))
    assert fake.engine.aborted == list(range(len(fake.engine.asked)))  # of several, those before it


def test_too_many_prompts_are_refused(fake: Served) -> None:
    assert refused(fake.client.post("/v1/completions", json={"prompt": ["a"] * 65}))["param"] == "prompt"


def test_what_could_never_be_taken_at_once_is_no_busy_queue(fake: Served) -> None:
    assert refused(fake.client.post("/v1/completions", json={"prompt": ["a"] * 64, "n": 8}))["param"] == "n"


@pytest.mark.parametrize(
    ("tokens", "most", "status"), [(255, 1, 200), (255, 2, 400), (256, None, 400), (257, None, 400)]
)
def test_prompt_and_answer_fit_the_model_or_are_refused(
    fake: Served, tokens: int, most: int | None, status: int
) -> None:
    """Case 40: the fake engine's length is 256."""
    response = fake.client.post("/v1/completions", json={"prompt": [50] * tokens, "max_tokens": most})
    assert response.status_code == status
    assert status == 200 or refused(response)["code"] == "context_length_exceeded"


def test_a_text_that_is_too_long_has_the_same_code(fake: Served) -> None:  # case 40
    for text in ("a b " * 500, "x" * (1 << 20)):
        error = refused(fake.client.post("/v1/completions", json={"prompt": text}))
        assert error["code"] == "context_length_exceeded"


def test_without_max_tokens_an_answer_takes_what_is_left(fake: Served) -> None:
    assert fake.client.post("/v1/completions", json={"prompt": [50] * 200}).is_success
    assert fake.engine.asked[0].max_tokens == 56


@pytest.mark.parametrize("token", ["<|MASK|>", "<|im_end|>", "<|im_start|>"])
def test_a_special_token_in_a_message_is_mere_text(fake: Served, token: str) -> None:  # cases 44 and 45
    content = f"say {token} now"
    assert fake.client.post(
        "/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]}
    ).is_success
    tokenizer: Tokenizer = fake.engine.tokenizer
    (prompt,) = fake.engine.prompts
    id = tokenizer.special[token]
    assert prompt.count(id) == tokenizer.chat(HELLO).count(id)
    assert content in tokenizer.decode(prompt)


def test_a_template_that_refuses_a_conversation_is_a_bad_request(
    fake: Served, monkeypatch: pytest.MonkeyPatch
) -> None:  # case 48
    def refuse(*_: object, **__: object) -> list[int]:
        raise RequestError("the chat template refuses the conversation: no")

    monkeypatch.setattr(fake.engine.tokenizer, "chat", refuse)
    assert "template" in refused(fake.client.post("/v1/chat/completions", json={"messages": HELLO}))["message"]


def test_the_server_answers_while_a_long_text_is_encoded(
    fake: Served, monkeypatch: pytest.MonkeyPatch
) -> None:  # case 47
    begun, go = threading.Event(), threading.Event()
    where: list[str] = []

    def slow(text: str, **_: object) -> list[int]:
        where.append(threading.current_thread().name)
        begun.set()
        assert go.wait(10)
        return [50] * 8

    monkeypatch.setattr(fake.engine.tokenizer, "encode", slow)
    replies: list[int] = []
    ask = threading.Thread(
        target=lambda: replies.append(fake.client.post("/v1/completions", json={"prompt": "x" * 10_000}).status_code)
    )
    ask.start()
    assert begun.wait(10)
    assert fake.client.get("/health").status_code == 200
    go.set()
    ask.join(10)
    monkeypatch.undo()
    assert replies == [200]
    assert where[0].startswith("dlx-text")


def test_texts_and_conversations_are_tokenised_and_back(fake: Served) -> None:
    tokenizer: Tokenizer = fake.engine.tokenizer
    text = fake.client.post("/v1/tokenize", json={"prompt": "Hello"}).json()
    assert text == {"tokens": tokenizer.encode("Hello"), "count": len(tokenizer.encode("Hello")), "max_model_len": 256}
    assert fake.client.post("/v1/tokenize", json={"messages": HELLO}).json()["tokens"] == tokenizer.chat(HELLO)
    assert fake.client.post("/v1/detokenize", json={"tokens": text["tokens"]}).json() == {"prompt": "Hello"}
    refused(fake.client.post("/v1/tokenize", json={}))
    refused(fake.client.post("/v1/detokenize", json={"tokens": [10**6]}))
    refused(fake.client.post("/v1/detokenize", json={"tokens": [50] * 257}))


def test_an_adapter_is_a_model_of_its_own_name() -> None:
    with Served(FakeEngine(), {"nano": None, "pirate": "pirate"}) as served:
        for name in ("nano", "pirate"):
            reply = served.client.post("/v1/completions", json={"prompt": "a", "model": name})
            assert reply.json()["model"] == name
        assert [params.adapter for params in served.engine.asked] == [None, "pirate"]
        listed = served.client.get("/v1/models").json()["data"]
        assert [(one["id"], one["parent"]) for one in listed] == [("nano", None), ("pirate", "nano")]
