"""The demo page in Chromium, over a server with the bundled model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.serve.served import Served

pytestmark = pytest.mark.browser

WAIT_S = 60.0
PNG_BYTES = 150_000
STORY = "Write a short story about a turtle and a little boat."
HOSTILE = "</script><img src=x onerror=alert(1)><b>&amp;\u202e"
Open = Callable[..., Any]  # → a playwright Page


def until(page: Any, fact: str) -> None:
    """Wait until a JavaScript expression holds; the page's own policy forbids it to evaluate text itself."""
    end = time.monotonic() + WAIT_S
    while not page.evaluate(fact):
        assert time.monotonic() < end, f"{fact} does not become true; the page says {page.inner_text('body')!r}"
        page.wait_for_timeout(10)


def ask(page: Any, prompt: str, threshold: float | None = None) -> None:
    page.fill("#prompt", prompt)
    if threshold is not None:
        page.fill("#threshold", str(threshold))
    page.press("#prompt", "Control+Enter")


def answered(page: Any) -> str:
    """Wait for the end of the answer that runs; its text."""
    until(page, "document.querySelector('#go').textContent === 'Answer'")
    return page.text_content("#text")


def api(served: Served, prompt: str, threshold: float | None = None) -> dict[str, Any]:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]}
    if threshold is not None:
        body["dlx"] = {"threshold": threshold}
    return served.client.post("/v1/chat/completions", json=body).json()


def shot(page: Any, request: pytest.FixtureRequest, name: str) -> None:
    """A screenshot, kept where --screenshots says."""
    folder = request.config.getoption("--screenshots", default=None)
    data = page.screenshot()
    assert len(data) <= PNG_BYTES
    if folder is not None:
        (folder / name).write_bytes(data)


def test_the_answer_is_the_apis_and_its_masks_were_seen_and_are_gone(opened: Open, served: Served) -> None:
    page = opened()
    ask(page, STORY)
    shown = answered(page)
    reply = api(served, STORY)
    assert shown == reply["choices"][0]["message"]["content"]
    assert page.locator(".tok").count() == 0
    seen = page.evaluate("({...seen, tones: seen.tones.size})")
    assert seen["masks"] >= 10
    assert seen["guesses"] >= 5
    assert seen["provisional"] >= 3
    assert seen["tones"] >= 5
    usage = reply["usage"]
    assert page.text_content("#nfe") == str(usage["dlx"]["nfe"])
    assert page.text_content("#tokens") == str(usage["completion_tokens"])
    assert page.text_content("#tpf") == f"{usage['dlx']['tokens_per_forward']:.1f}"
    assert page.told == []


def test_a_block_is_seen_half_denoised_and_stopped(opened: Open, request: pytest.FixtureRequest) -> None:
    page = opened(1040, 780)
    page.check("#slow")
    ask(page, STORY)
    tiles = "document.querySelectorAll('.tok.%s').length"
    half = f"document.querySelector('.done').textContent.length > 60 && {tiles % 'set'} > 3 && {tiles % 'mask'} > 5"
    until(page, half)
    page.wait_for_timeout(120)  # colours settle
    shot(page, request, "page.png")
    page.keyboard.press("Escape")
    text = answered(page)
    assert len(text) > 60
    assert page.locator(".tok").count() == 0
    assert page.text_content("#status") == "Stopped."
    assert page.told == []


def test_a_phone_needs_no_sideways_scroll(opened: Open, request: pytest.FixtureRequest) -> None:
    page = opened(360, 740, is_mobile=True, has_touch=True, color_scheme="dark", device_scale_factor=1)
    wide = "document.documentElement.scrollWidth"
    assert page.evaluate(wide) == 360
    page.tap("text=CSV to JSON")
    answered(page)
    assert page.evaluate(wide) == 360
    ask(page, "a" * 400)  # the model says it after, a word of many lines
    until(page, "document.querySelector('.done').textContent.length > 60")
    assert page.evaluate(wide) == 360
    page.keyboard.press("Escape")
    page.check("#slow")
    ask(page, STORY)
    until(page, "document.querySelectorAll('.tok.set').length > 2 && document.querySelectorAll('.tok.mask').length > 5")
    page.evaluate("scrollTo({ top: 190, behavior: 'instant' })")
    page.wait_for_timeout(120)
    assert page.evaluate(wide) == 360
    shot(page, request, "page-phone.png")
    page.tap("#go")
    assert page.told == []


def test_the_slider_is_sent_once_it_was_moved(opened: Open, served: Served) -> None:
    sent: list[dict[str, Any]] = []
    page = opened()
    page.on("request", lambda r: sent.append(json.loads(r.post_data)) if r.post_data else None)
    ask(page, "What is 19 * 27?")
    answered(page)
    ask(page, "What is 19 * 27?", threshold=0.5)
    shown = answered(page)
    assert [body.get("dlx") for body in sent] == [None, {"threshold": 0.5}]
    assert shown == api(served, "What is 19 * 27?", 0.5)["choices"][0]["message"]["content"]
    page.click("#reset")
    assert page.text_content("#level") == "auto"


def test_what_a_model_says_is_shown_as_text_whatever_it_is(opened: Open) -> None:
    block = {
        "token_offset": 0,
        "token_ids": [1, 2],
        "text": [HOSTILE, ""],
        "masked": [False, True],
        "confidence": [0.5, 0.1],
        "guess_ids": [1, 1],
        "guess_text": [HOSTILE, HOSTILE],
    }
    last = {"index": 0, "delta": {"content": HOSTILE}, "finish_reason": "stop", "dlx": {"nfe": 2, "total_s": 1.0}}
    told = [
        {"type": "provisional", "choices": [], "dlx": {"nfe": 1, "tokens": 0, "block": block}},
        {"type": "committed", "choices": [last], "dlx": {"nfe": 2, "tokens": 3}},
    ]
    stream = "".join(f"data: {json.dumps(event)}\n\n" for event in told) + "data: [DONE]\n\n"
    page = opened()
    page.check("#slow")
    page.route("**/v1/chat/completions", lambda r: r.fulfill(status=200, content_type="text/event-stream", body=stream))
    ask(page, "hi")
    page.locator(".tok.set").wait_for()
    assert page.text_content(".tok.set") == page.text_content(".tok.mask") == HOSTILE
    assert answered(page) == HOSTILE
    assert page.locator("#text img, #text b, #text script").count() == 0
    assert page.told == []


@pytest.mark.parametrize(
    ("status", "headers", "said"),
    [
        (429, {"retry-after": "7"}, "Try again in 7 seconds."),
        (503, {"retry-after": "5"}, "The server is not ready."),
        (400, {}, "the prompt is too odd"),
        (500, {}, "The server failed on this one."),
    ],
)
def test_what_goes_wrong_is_told_kindly(opened: Open, status: int, headers: dict[str, str], said: str) -> None:
    body = json.dumps({"error": {"message": "the prompt is too odd", "code": "x"}})
    page = opened()
    page.route(
        "**/v1/chat/completions",
        lambda r: r.fulfill(status=status, headers=headers, content_type="application/json", body=body),
    )
    ask(page, "hi")
    page.locator("#error").wait_for()
    assert said in page.inner_text("#error")
    assert page.text_content("#go") == "Answer"


def test_an_answer_that_breaks_off_keeps_what_was_committed(opened: Open) -> None:
    told = {"type": "committed", "choices": [{"index": 0, "delta": {"content": "Half of it"}, "finish_reason": None}]}
    page = opened()
    page.route(
        "**/v1/chat/completions",
        lambda r: r.fulfill(status=200, content_type="text/event-stream", body=f"data: {json.dumps(told)}\n\n"),
    )
    ask(page, "hi")
    page.locator("#error").wait_for()
    assert "broke off" in page.inner_text("#error")
    assert page.text_content(".done") == "Half of it"


def test_a_fault_within_a_stream_is_told(opened: Open) -> None:
    told = {"type": "committed", "choices": [{"index": 0, "delta": {"content": "Half of it"}, "finish_reason": None}]}
    fault = {"error": {"message": "the step failed", "code": "engine_error"}}
    body = f"data: {json.dumps(told)}\n\nevent: error\ndata: {json.dumps(fault)}\n\n"
    page = opened()
    page.route("**/v1/chat/completions", lambda r: r.fulfill(status=200, content_type="text/event-stream", body=body))
    ask(page, "hi")
    page.locator("#error").wait_for()
    assert "the step failed" in page.inner_text("#error")
    assert answered(page) == "Half of it"
    assert page.text_content("#status") == "The answer broke off."


def test_a_server_with_a_key_is_given_it(opened: Open) -> None:
    keys: list[str | None] = []

    def guard(route: Any) -> None:
        keys.append(route.request.headers.get("authorization"))
        if keys[-1] == "Bearer secret":
            route.continue_()
        else:
            route.fulfill(status=401, content_type="application/json", body="{}")

    page = opened()
    page.route("**/v1/chat/completions", guard)
    ask(page, "What is 19 * 27?")
    page.locator("#keyform").wait_for()
    page.fill("#key", "secret")
    page.press("#key", "Enter")
    assert "513" in answered(page)
    assert keys == [None, "Bearer secret"]
    assert page.is_hidden("#keyform")


def test_all_is_reached_by_keyboard_and_nothing_moves_for_those_who_asked(opened: Open) -> None:
    page = opened(reduced_motion="reduce")
    reached = []
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert reached[:5] == ["theme", "prompt", "threshold", "slow", "go"]
    assert "short story" in reached
    ask(page, "What is 19 * 27?")
    answered(page)
    moving = "[...document.querySelectorAll('*')].filter((e) => getComputedStyle(e).animationName !== 'none').length"
    assert page.evaluate(moving) == 0


def test_colours_follow_the_system_and_the_button(opened: Open) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    light, dark = (opened(color_scheme=scheme) for scheme in ("light", "dark"))
    colours = [light.evaluate(paper), dark.evaluate(paper)]
    assert colours[0] != colours[1]
    dark.click("#theme")
    assert dark.evaluate(paper) == colours[0]
    dark.reload()
    assert dark.evaluate(paper) == colours[0]


def test_the_page_asks_nobody_else_and_its_policy_lets_it_not(opened: Open, served: Served) -> None:
    asked: list[str] = []
    page = opened(before=lambda page: page.on("request", lambda r: asked.append(r.url)))
    assert page.evaluate("fetch('https://example.com').then(() => 'sent', () => 'refused')") == "refused"
    assert {url for url in asked if not url.startswith(("data:", served.url, "https://example.com"))} == set()
    policy = served.client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy


def test_the_page_is_one_file_of_its_own() -> None:
    text = (Path(__file__).parents[2] / "dlx" / "serve" / "page" / "index.html").read_text()
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert word not in text
