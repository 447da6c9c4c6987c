"""The demo's pages through the edge, in a real browser."""

import re
from collections.abc import Callable
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import BrowserContext, Page, Response, TimeoutError, expect

EdgeUrl = Callable[[str], str]  # name of a listener -> its base address
NewUser = Callable[[], BrowserContext]

expect.set_options(timeout=15_000)


def shown(page: Page, name: str) -> str:
    return page.get_by_test_id(name).inner_text()


def wait_for_websocket(page: Page) -> None:
    expect(page.get_by_test_id("state")).to_have_text("connected")
    expect(page.get_by_test_id("transport")).to_have_text("websocket")
    expect(page.get_by_test_id("node")).not_to_have_text("none yet")


def open_page(context: BrowserContext, url: str) -> Page:
    page = context.new_page()
    page.goto(url)
    wait_for_websocket(page)
    return page


def say(page: Page, text: str) -> None:
    """Send a message as a user does, and wait until the page shows the echo from its node."""
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send").click()
    echo = page.get_by_role("log").locator(".echo").filter(has_text=f"{shown(page, 'node')} {text}")
    expect(echo).to_have_count(1)


def transport_of(url: str) -> str | None:
    return parse_qs(urlsplit(url).query).get("transport", [None])[0]


def test_client_defaults_on_one_node(edge_url: EdgeUrl, new_user: NewUser, complaints: list[str]) -> None:
    page = new_user().new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    upgraded: list[str] = []
    page.on("websocket", lambda websocket: upgraded.append(websocket.url))

    served = page.goto(f"{edge_url('single')}/index.html")
    wait_for_websocket(page)
    say(page, "hello")

    assert next(transport_of(url) for url in asked if "/socket.io/" in url) == "polling"
    assert [transport_of(url) for url in upgraded] == ["websocket"]
    assert not [url for url in asked + upgraded if "client_id" in url]
    assert shown(page, "node") == served.header_value("x-served-by")
    assert shown(page, "reconnects") == "0"
    assert shown(page, "error") == "none"
    assert complaints == []


def test_root_is_the_page_with_client_defaults(edge_url: EdgeUrl, new_user: NewUser, complaints: list[str]) -> None:
    page = open_page(new_user(), f"{edge_url('single')}/")
    expect(page.get_by_role("link", name="Client defaults")).to_have_attribute("aria-current", "page")
    assert complaints == []


def test_named_user_keeps_id_and_node_in_all_tabs(edge_url: EdgeUrl, new_user: NewUser, complaints: list[str]) -> None:
    user = new_user()
    seen: set[tuple[str, str]] = set()
    for tab in range(3):
        page = user.new_page()
        transports: list[str | None] = []
        page.on("request", lambda request, to=transports: to.append(transport_of(request.url)))
        page.goto(f"{edge_url('sticky')}/index2.html")
        wait_for_websocket(page)
        seen.add((shown(page, "client-id"), shown(page, "node")))
        for _ in range(2):
            served = page.reload()
            wait_for_websocket(page)
            seen.add((shown(page, "client-id"), shown(page, "node")))
            # The address of the page has the id by now, so the edge hashes the request for the page by it too.
            assert shown(page, "node") == served.header_value("x-served-by")
        say(page, f"from tab {tab}")
        assert "polling" not in transports
        assert parse_qs(urlsplit(page.url).query) == {"client_id": [shown(page, "client-id")]}
    assert len(seen) == 1, seen
    client_id = seen.pop()[0]
    assert re.fullmatch(r"[a-z0-9-]{16,}", client_id), "an id that would be percent-encoded"
    assert complaints == []


def test_named_user_wanders_without_a_key(edge_url: EdgeUrl, new_user: NewUser) -> None:
    """The negative control: a single WebSocket works on any node, and one id reaches several nodes."""
    page = open_page(new_user(), f"{edge_url('unkeyed')}/index2.html")
    client_id, nodes = shown(page, "client-id"), {shown(page, "node")}
    for _ in range(20):
        page.reload()
        wait_for_websocket(page)
        nodes.add(shown(page, "node"))
        if len(nodes) > 1:
            break
    assert shown(page, "client-id") == client_id
    assert len(nodes) > 1


def test_a_shared_link_carries_the_id(edge_url: EdgeUrl, new_user: NewUser) -> None:
    mine = open_page(new_user(), f"{edge_url('sticky')}/index2.html")
    friend = new_user()
    own = shown(open_page(friend, f"{edge_url('sticky')}/index2.html"), "client-id")
    theirs = open_page(friend, mine.url)
    assert shown(theirs, "client-id") == shown(mine, "client-id") != own
    assert shown(theirs, "node") == shown(mine, "node")
    assert shown(open_page(friend, f"{edge_url('sticky')}/index2.html"), "client-id") == own


def test_an_id_that_clients_encode_differently_is_replaced(edge_url: EdgeUrl, new_user: NewUser) -> None:
    page = open_page(new_user(), f"{edge_url('sticky')}/index2.html?client_id=a%20b")
    assert re.fullmatch(r"[a-z0-9-]{16,}", shown(page, "client-id"))
    assert parse_qs(urlsplit(page.url).query) == {"client_id": [shown(page, "client-id")]}


def test_named_users_are_many_and_spread(edge_url: EdgeUrl, new_user: NewUser, complaints: list[str]) -> None:
    # New ids are random: 16 users share one of two nodes in one of 30 000 runs, of three in one of 14 million.
    client_ids, nodes = set(), set()
    for _ in range(16):
        user = new_user()
        page = open_page(user, f"{edge_url('sticky')}/index2.html")
        client_ids.add(shown(page, "client-id"))
        nodes.add(shown(page, "node"))
        user.close()
    assert len(client_ids) == 16
    assert len(nodes) >= 2
    assert complaints == []


TALK = """async () => {
  const socket = io({ query: { client_id: "talks-for-long" }, transports: ["websocket"], forceNew: true });
  const seen = { disconnects: 0, characters: 0 };
  socket.on("disconnect", () => (seen.disconnects += 1));
  for (const size of [...Array(50).fill(90_000), 900_000]) {
    const answer = await socket.timeout(10_000).emitWithAck("message", "x".repeat(size));
    seen.characters += answer.split(": ")[1].length;
  }
  const found = { ...seen };
  socket.disconnect();
  return found;
}"""


def test_a_websocket_that_talks_for_long_stays(edge_url: EdgeUrl, new_user: NewUser, complaints: list[str]) -> None:
    """It sends more in all than a request body may have, and single messages up to that size."""
    page = open_page(new_user(), f"{edge_url('sticky')}/index2.html")
    assert page.evaluate(TALK) == {"disconnects": 0, "characters": 50 * 90_000 + 900_000}
    assert complaints == []


def test_client_defaults_on_the_ring_stay_by_cookie(
    edge_url: EdgeUrl, new_user: NewUser, complaints: list[str]
) -> None:
    user = new_user()
    page = open_page(user, f"{edge_url('sticky')}/index.html")
    node = shown(page, "node")
    assert len(user.cookies()) == 1, "the edge issues one cookie"
    for _ in range(3):
        page.reload()
        wait_for_websocket(page)
        assert shown(page, "node") == node
    say(page, "held by a cookie")
    assert shown(page, "error") == "none"
    assert complaints == []


def test_client_defaults_without_a_key_fail_in_plain_sight(
    edge_url: EdgeUrl, new_user: NewUser, complaints: list[str]
) -> None:
    # Three polls in a row may reach the same node by chance, so one user can succeed, but not six in a row.
    refused: list[Response] = []
    for _ in range(6):
        user = new_user()
        page = user.new_page()
        page.on("response", lambda response: refused.append(response) if response.status == 400 else None)
        page.goto(f"{edge_url('unkeyed')}/index.html")
        try:
            page.get_by_role("log").locator(".error").filter(has_text="Invalid session").first.wait_for(timeout=5_000)
        except TimeoutError:
            continue
        expect(page.get_by_test_id("error")).not_to_have_text("none")
        expect(page.get_by_test_id("reconnects")).not_to_have_text("0")
        assert user.cookies() == []
        assert "Invalid session" in refused[0].text()
        assert [text for text in complaints if "400" in text], "refused requests must show up in the console"
        return
    pytest.fail("six users in a row polled without a key and none was refused")


@pytest.mark.parametrize("name", ["index.html", "index2.html"])
def test_page_fits_a_phone(edge_url: EdgeUrl, new_user: NewUser, name: str) -> None:
    page = open_page(new_user(), f"{edge_url('sticky')}/{name}")
    say(page, "x" * 300)
    overhang = "document.documentElement.scrollWidth - window.innerWidth"
    assert page.evaluate(overhang) <= 0
    page.locator("main").evaluate("main => { main.style.width = '400px'; }")
    assert page.evaluate(overhang) > 0, "the measurement must notice a page that is too wide"


def test_client_script_is_served(edge_url: EdgeUrl, new_user: NewUser) -> None:
    script = new_user().request.get(f"{edge_url('sticky')}/socket.io.min.js")
    assert script.status == 200
    assert "javascript" in script.headers["content-type"]
    assert "Socket.IO v4." in script.text()[:200]


def test_page_says_that_its_client_script_is_missing(edge_url: EdgeUrl, new_user: NewUser) -> None:
    user = new_user()
    user.route("**/socket.io.min.js", lambda route: route.abort())
    page = user.new_page()
    page.goto(f"{edge_url('sticky')}/index.html")
    expect(page.get_by_test_id("state")).to_have_text("disconnected")
    expect(page.get_by_test_id("error")).to_contain_text("socket.io.min.js was not loaded")
