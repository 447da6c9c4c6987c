#!/usr/bin/env python3
"""Takes the README's picture: two tabs of one user and one of another, as a running edge serves them."""

import argparse
import sys
import tempfile
from pathlib import Path
from urllib.parse import urljoin

from playwright.sync_api import BrowserContext, Error, Page, ViewportSize, sync_playwright

CHROMIUM = "/usr/bin/chromium"  # Debian's package; Playwright's own browser is not installed
MOST_USERS = 20
TAB = ViewportSize(width=400, height=960)
PICTURE = ViewportSize(width=3 * 400 + 4 * 20, height=960 + 76)
FRAME = """
<style>
  body {{ margin: 0; padding: 20px; display: flex; align-items: start; gap: 20px; background: #dfe4ea }}
  figure {{ margin: 0; border-radius: 8px; overflow: hidden; box-shadow: 0 1px 6px #0004; background: #fff }}
  figcaption {{ padding: 8px 16px; background: #c9d1da; color: #1b2027; font: 600 14px system-ui, sans-serif }}
  img {{ display: block }}
</style>
<figure><figcaption>A user</figcaption><img src="{0}"></figure>
<figure><figcaption>The same user, another tab</figcaption><img src="{1}"></figure>
<figure><figcaption>Another user</figcaption><img src="{2}"></figure>
"""


def open_tab(user: BrowserContext, url: str) -> Page:
    """Open the page in a new tab and wait until a node has said welcome."""
    tab = user.new_page()
    tab.goto(url)
    tab.locator("[data-testid=log] .echo").wait_for()
    return tab


def say(tab: Page, text: str) -> None:
    """Send a message and wait for its echo."""
    echoes = tab.locator("[data-testid=log] .echo")
    before = echoes.count()
    tab.get_by_label("Message").fill(text)
    tab.get_by_role("button", name="Send").click()
    echoes.nth(before).wait_for()


def take(base_url: str, output: Path) -> None:
    """Write the picture of three tabs on the edge at `base_url` to `output` (PNG)."""
    url = urljoin(base_url, "/index2.html")
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as scratch:
        switches = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=switches)

        def new_user() -> BrowserContext:
            user = browser.new_context(viewport=TAB)
            user.set_default_timeout(15_000)
            return user

        user = new_user()
        tabs = [open_tab(user, url), open_tab(user, url)]
        # The ring may assign a second user to the same node; the picture needs a user on another one.
        for _ in range(MOST_USERS):
            other = open_tab(new_user(), url)
            if other.get_by_test_id("node").inner_text() != tabs[0].get_by_test_id("node").inner_text():
                break
        tabs.append(other)

        shots: list[Path] = []
        for tab, text in zip(tabs, ("hello", "the same node here", "and another one here"), strict=True):
            say(tab, text)
            shots.append(Path(scratch, f"{len(shots)}.png"))
            tab.screenshot(path=shots[-1])
        frame = Path(scratch, "frame.html")
        frame.write_text(FRAME.format(*(shot.name for shot in shots)))
        picture = browser.new_page(viewport=PICTURE)
        picture.goto(frame.as_uri())
        picture.screenshot(path=output)
        browser.close()


def main() -> None:
    """Parse the arguments and take the picture, or fail with one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="address of a listener of the edge, such as http://198.51.100.10:9002")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).with_name("demo.png"),
        help="the PNG file to write (default: demo.png beside this script)",
    )
    arguments = parser.parse_args()
    try:
        take(arguments.url, arguments.output)
    except (Error, OSError) as error:
        sys.exit(f"no screenshot of {arguments.url}: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
