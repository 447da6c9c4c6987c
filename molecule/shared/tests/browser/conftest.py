"""A real browser for the tests, and a new user for each who asks."""

from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, sync_playwright

# Debian's own browser: there is no other on a machine that may only install from package mirrors.
CHROMIUM = "/usr/bin/chromium"
# No sandbox because root may not have one; the rest keeps the browser from talking to anybody but the edge.
SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


# Not for the whole session: Playwright's event loop runs as long as it lives, and other modules use asyncio.run.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield chromium
        chromium.close()


@pytest.fixture
def complaints() -> list[str]:
    """What the pages of this test's users wrote to the console as an error, or threw."""
    return []


@pytest.fixture
def new_user(browser: Browser, complaints: list[str]) -> Iterator[Callable[[], BrowserContext]]:
    """Call it for a browser profile without a past: no storage, no cookie, phone-sized window."""
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
