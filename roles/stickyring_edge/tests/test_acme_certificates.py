"""The script that renews certificates: what is due, and what it does with what an authority has given or refused.

Its client is a stand-in here; in the lab it is the real one, with an authority.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from certificates import make_certificate
from cryptography import x509
from jinja2 import Environment, FileSystemLoader

TEMPLATES = Path(__file__).parents[1] / "templates"
DIRECTORY = "https://acme.example.com/directory"
LISTENERS: list[dict[str, Any]] = [
    {"name": "public", "names": ["chat.example.com", "www.example.com"]},
    {"name": "other", "names": ["chat.example.com"]},
]
REFUSED = "refused.example.com"
UACME = """#!/bin/sh
echo "$@" >> {calls}
while [ "$1" != --confdir ]; do shift; done
client=$2
for word; do [ "$word" != new ] || {new}; done
while [ "$1" != issue ]; do shift; [ $# -gt 0 ] || exit 0; done
[ "$2" != refused.example.com ] || {{ echo "uacme: refused" >&2; exit 2; }}
mkdir -p $client/$2 $client/private/$2
cp {given}/chain.pem $client/$2/cert.pem
cp {given}/key.pem $client/private/$2/key.pem
"""


class Script:
    """The script of these listeners, with a client that takes certificates from the folder `given`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state, self.calls, self.given = folder / "state", folder / "calls", folder / "given"
        for one in (self.state, self.given, folder / "bin"):
            one.mkdir()
        self.client("exit 0")

    def client(self, new: str) -> None:
        """Have the client do this when it is asked for an account."""
        uacme = self.folder / "bin" / "uacme"
        uacme.write_text(UACME.format(calls=self.calls, given=self.given, new=new))
        uacme.chmod(0o755)

    def run(self, *words: str, listeners: list[dict[str, Any]] = LISTENERS, directory: str = DIRECTORY) -> Any:
        self.calls.write_text("")
        environment = Environment(loader=FileSystemLoader(TEMPLATES), keep_trailing_newline=True, autoescape=False)
        environment.filters |= {"quote": shlex.quote, "comment": "# {}".format}
        text = environment.get_template("acme_certificates.sh.j2").render(
            ansible_managed="",
            stickyring_edge_acme_directory=directory,
            stickyring_edge_acme_contact="ops@example.com",
            __stickyring_edge_acme_listeners=listeners,
            __stickyring_edge_acme_state=str(self.state),
            __stickyring_edge_acme_configuration=str(self.folder),
            __stickyring_edge_acme_thumbprint="thumbprint",
        )
        script = self.folder / "certificates"
        script.write_text(text)
        script.chmod(0o755)
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return subprocess.run(
            [script, *words], env={"PATH": path}, capture_output=True, text=True, timeout=30, check=False
        )

    def served(self, listener: str) -> x509.Certificate:
        return x509.load_pem_x509_certificate((self.state / listener / "served" / "chain.pem").read_bytes())


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """It has given a new certificate to both listeners."""
    one = Script(tmp_path)
    make_certificate(one.given, days=90)
    assert one.run().returncode == 0
    return one


def test_a_stand_in_is_served_until_there_is_a_certificate(tmp_path: Path) -> None:
    script = Script(tmp_path)
    assert script.run("stand_in").stdout.split() == ["public", "other"]
    names = script.served("public").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["stand-in.invalid", "chat.example.com", "www.example.com"]
    assert script.run("stand_in").stdout == "", "it is there"
    for command in ("due", "missing"):
        assert script.run(command).stdout.split() == ["public", "other"]
    given = make_certificate(script.given, days=90)
    done = script.run()
    assert (done.returncode, done.stderr) == (0, "")
    assert script.served("public").serial_number == given.serial
    key = script.state / "public" / "served" / "key.pem"
    assert (key.read_text(), key.stat().st_mode & 0o777) == (given.key, 0o640)


def test_what_is_served_stays_until_its_last_third(script: Script) -> None:
    for age, due in ((59, []), (61, ["public", "other"])):
        make_certificate(script.given, days=90, age=age)
        for listener in ("public", "other"):
            (script.state / listener / "served" / "chain.pem").write_text((script.given / "chain.pem").read_text())
        assert script.run("due").stdout.split() == due
        assert script.run("missing").stdout == "", "it is valid"
    given = make_certificate(script.given, days=90)
    assert script.run().returncode == 0
    assert script.served("public").serial_number == given.serial
    assert script.calls.read_text().count(" issue ") == len(LISTENERS)
    assert script.run().returncode == 0
    assert script.calls.read_text() == "", "nobody is asked without need"


@pytest.mark.parametrize(
    "change",
    [
        {"listeners": [{"name": "public", "names": ["chat.example.com"]}, LISTENERS[1]]},
        {"directory": "https://other.example.com/directory"},
    ],
)
def test_other_names_or_another_directory_are_missing(script: Script, change: dict[str, Any]) -> None:
    assert script.run("missing", **change).stdout.split()[0] == "public"
    assert script.run(**change).returncode == 0
    assert script.run("missing", **change).stdout == ""


def test_one_that_has_expired_is_missing(script: Script) -> None:
    expired = make_certificate(script.given, days=1, age=2)
    (script.state / "public" / "served" / "chain.pem").write_text(expired.chain)
    assert script.run("missing").stdout.split() == ["public"]


def test_one_that_is_refused_does_not_keep_others_from_theirs(script: Script) -> None:
    before = script.served("public").serial_number
    make_certificate(script.given, days=90)
    refused = [{"name": "public", "names": [REFUSED]}, {"name": "other", "names": ["b.example.com"]}]
    done = script.run(listeners=refused)
    assert (done.returncode, done.stderr) == (1, "uacme: refused\n")
    assert script.served("public").serial_number == before
    assert script.run("missing", listeners=refused).stdout.split() == ["public"]


def test_an_account_that_exists_gets_the_contact_and_another_error_is_passed_on(script: Script) -> None:
    script.client("{ echo 'uacme: Account already exists at x' >&2; exit 2; }")
    assert script.run(directory="https://other.example.com/directory").returncode == 0
    assert " update ops@example.com" in script.calls.read_text()
    script.client("{ echo 'uacme: no such account' >&2; exit 2; }")
    done = script.run()
    assert (done.returncode, done.stderr) == (1, "uacme: no such account\n" * len(LISTENERS))
    assert " issue " not in script.calls.read_text()


def test_what_belongs_to_no_listener_is_deleted(script: Script) -> None:
    kept = LISTENERS[:1]
    assert script.run("due", listeners=kept).stdout.split() == [str(script.state / "other")]
    assert script.run(listeners=kept).returncode == 0
    assert [one.name for one in script.state.iterdir()] == ["public"]
    assert len([*(script.state / "public").glob("version.*")]) == 1, "of a listener, only what is served is kept"


def test_only_the_challenge_that_edges_answer_is_accepted(script: Script) -> None:
    def accepts(kind: str, answer: str) -> bool:
        return bool(script.run("begin", kind, "chat.example.com", "token", answer).returncode == 0)

    assert accepts("http-01", "token.thumbprint")
    assert not accepts("http-01", "token.other")
    assert not accepts("dns-01", "token.thumbprint")
