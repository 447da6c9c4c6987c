"""Scheme and address of a client: only edges are trusted."""

from pathlib import Path
from typing import Any

import pytest

from stickyring.node import forwarded
from stickyring.node.forwarded import Edges

EDGE, OTHER, CLIENT = "192.0.2.10", "192.0.2.66", "198.51.100.7"


def seen(edges: Edges, peer: str, scheme: str = "https", client: str = CLIENT) -> tuple[str, str]:
    """The scheme and client address that the application sees."""
    environ: dict[str, Any] = {"wsgi.url_scheme": "http", "REMOTE_ADDR": peer}
    edges.tell(environ | {})
    environ |= {"HTTP_X_FORWARDED_PROTO": scheme, "HTTP_X_STICKYRING_CLIENT": client}
    edges.tell(environ)
    return environ["wsgi.url_scheme"], environ["REMOTE_ADDR"]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(forwarded, "FRESH_SECONDS", 0)
    return tmp_path / "edges"


def test_only_edges_are_trusted(file: Path) -> None:
    file.write_text(f"{EDGE}\n2001:db8::1\n")
    edges = Edges(file)
    assert seen(edges, EDGE) == ("https", CLIENT)
    assert seen(edges, "2001:DB8:0::1") == ("https", CLIENT)
    assert seen(edges, f"::ffff:{EDGE}") == ("https", CLIENT)
    for other in (OTHER, "127.0.0.1", ""):
        assert seen(edges, other) == ("http", other)


def test_an_invalid_scheme_or_address_is_ignored(file: Path) -> None:
    file.write_text(EDGE)
    edges = Edges(file)
    assert seen(edges, EDGE, scheme="ftp", client="somebody") == ("http", EDGE)
    assert seen(edges, EDGE, scheme="https,http", client="2001:db8::7") == ("http", "2001:db8::7")


def test_a_new_edge_is_trusted_without_a_restart(file: Path) -> None:
    file.write_text(f"{EDGE}\n")
    edges = Edges(file)
    assert seen(edges, OTHER) == ("http", OTHER)
    file.write_text(f"{EDGE}\n{OTHER}\n")
    assert seen(edges, OTHER) == ("https", CLIENT)
    file.write_text(f"{OTHER}\n")
    assert seen(edges, EDGE) == ("http", EDGE)


def test_without_a_file_or_a_line_loopback_is_trusted(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.write_text("")
    for edges in (Edges(), Edges(file)):
        assert seen(edges, "127.0.0.1") == seen(edges, "::1") == ("https", CLIENT)
        assert seen(edges, EDGE) == ("http", EDGE)
    file.unlink()
    assert seen(Edges(file), EDGE) == ("http", EDGE)
    assert "cannot read the addresses of the edges" in caplog.text


def test_an_edges_own_request_comes_from_its_address_and_names_no_client(file: Path) -> None:
    file.write_text(EDGE)
    edges = Edges(file)
    assert edges.tell({"REMOTE_ADDR": EDGE})
    assert not edges.tell({"REMOTE_ADDR": OTHER})
    for client in (CLIENT, "", "somebody"):
        assert not edges.tell({"REMOTE_ADDR": EDGE, "HTTP_X_STICKYRING_CLIENT": client})
