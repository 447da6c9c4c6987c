"""A real browser, and new users for the tests."""

from collections.abc import Callable, Iterator

import environment
import pytest
from playwright.sync_api import Browser, BrowserContext, sync_playwright


# One browser per module: Playwright's event loop runs as long as the browser, and other modules use asyncio.run.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=environment.CHROMIUM, args=environment.SWITCHES)
        yield chromium
        chromium.close()


@pytest.fixture
def complaints() -> list[str]:
    """Console errors and exceptions of the pages of this test's users."""
    return []


@pytest.fixture
def new_user(browser: Browser, complaints: list[str]) -> Iterator[Callable[[], BrowserContext]]:
    """Creates browser profiles without storage and cookies, with a phone-sized window."""
    contexts: list[BrowserContext] = []

    def make() -> BrowserContext:
        context = browser.new_context(viewport={"width": 360, "height": 740})
        context.set_default_timeout(15_000)
        context.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        context.on("weberror", lambda error: complaints.append(str(error.error)))
        contexts.append(context)
        return context

    yield make
    for context in contexts:
        context.close()
