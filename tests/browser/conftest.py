"""A server over the bundled model, and Chromium: Debian's, as `make test-browser` installs it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.served import Served

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", type=Path, default=None, help="folder that screenshots of the page are put in")


@pytest.fixture(scope="package")
def served(tiny: Path) -> Iterator[Served]:
    """The bundled model, with confidences."""
    from dlx.async_engine import AsyncEngine
    from dlx.config import Config

    engine = AsyncEngine(Config.from_args(tiny, graphs="off", device="cpu", max_num_seqs=2, watch=True))
    with Served(engine, {"tiny": None}) as served:
        yield served


@pytest.fixture(scope="package")
def chromium() -> Iterator[Any]:  # Any: a playwright Browser
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install '.[browser]'")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium, or make test-browser as root")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium: Any, served: Served) -> Iterator[Callable[..., Any]]:  # Any: a playwright Page
    """Opens the page: opened(width, height, **options of the context); `page.told` lists console and script errors."""
    contexts = []

    def open_page(width: int = 1040, height: int = 800, before: Callable[[Any], object] | None = None, **options: Any):
        context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.told = []
        page.on("console", lambda message: page.told.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: page.told.append(str(error)))
        page.on("dialog", lambda dialog: (page.told.append("a dialog"), dialog.dismiss()))
        page.add_init_script(SEEN)
        if before is not None:
            before(page)
        page.goto(served.url)
        page.locator("#facts:has-text('tiny')").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()


# counts what was on the page at any time: masks, and decided tokens that were not committed
SEEN = """
window.seen = { masks: 0, provisional: 0, guesses: 0, tones: new Set() };
addEventListener("DOMContentLoaded", () => new MutationObserver(() => {
  const all = (what) => [...document.querySelectorAll(what)];
  seen.masks = Math.max(seen.masks, all(".tok.mask").length);
  seen.provisional = Math.max(seen.provisional, all(".tok.set").length);
  seen.guesses = Math.max(seen.guesses, all(".tok.mask").filter((tile) => tile.textContent).length);
  for (const tile of all(".tok.set")) seen.tones.add(tile.style.getPropertyValue("--p"));
}).observe(document.getElementById("text"), { childList: true, subtree: true, attributes: true }));
"""
