"""Certificates by ACME: got when the edge is deployed, renewed under open WebSockets, kept when one cannot be got."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import ssl
import time
from typing import Any

import aiohttp
import pytest

pytestmark = pytest.mark.once("operations")
testinfra_hosts = ["ansible://edge?sudo=true"]
WEBSOCKETS = 200
RENEWALS = 3
SERVED_SECONDS = 10
DIRECTORY = "https://acme.example.test:14000/dir"
SERVED = "/var/lib/stickyring-edge-acme/public/served"
UNIT = "stickyring-edge-acme"
CONNECT, CONNECTED, PING = "40", "40", "2"
"""Packets of Engine.IO and Socket.IO."""


def serial(fleet: Any) -> str:
    """Of the certificate that a new connection gets, which a client that trusts the authority alone accepts."""
    with (
        socket.create_connection((fleet.address, 443), timeout=5) as plain,
        fleet.context().wrap_socket(plain, server_hostname=fleet.name) as secure,
    ):
        certificate = secure.getpeercert()
        assert certificate
        return str(certificate["serialNumber"])


def changed(run: Any) -> set[str]:
    return set(re.findall(r"changed=(\d+)", run.stdout))


def test_it_is_got_when_the_edge_is_deployed(host: Any, fleet: Any, deploy: Any) -> None:
    with pytest.raises(OSError):
        serial(fleet)
    deploy("--check")
    deploy()
    serial(fleet)
    # The control: a client that does not know this authority.
    with (
        socket.create_connection((fleet.address, 443), timeout=5) as plain,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        ssl.create_default_context().wrap_socket(plain, server_hostname=fleet.name)
    assert changed(deploy()) == {"0"}
    assert host.file(f"{SERVED}/key.pem").mode == 0o640
    assert host.file(f"{SERVED}/key.pem").group == "stickyring-edge"
    assert host.service(f"{UNIT}.timer").is_enabled
    host.check_output(f"systemd-analyze security --threshold=20 {UNIT}.service")


def test_renewals_end_no_websocket(host: Any, fleet: Any) -> None:
    def renew() -> str:
        """As the timer does it, once it is due."""
        former = serial(fleet)
        host.check_output(f"rm {SERVED}/for && systemctl start {UNIT}.service")
        deadline = time.monotonic() + SERVED_SECONDS
        while (now := serial(fleet)) == former:
            assert time.monotonic() < deadline, "a renewed certificate is not served"
        return now

    async def hold() -> set[str]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            url = f"wss://{fleet.address}/socket.io/?EIO=4&transport=websocket&client_id="
            options: dict[str, Any] = {"ssl": fleet.context(), "server_hostname": fleet.name}
            opened = [await session.ws_connect(f"{url}user-{number}", **options) for number in range(WEBSOCKETS)]
            serials = {await asyncio.to_thread(renew) for _ in range(RENEWALS)}
            await asyncio.gather(*map(answer, opened))
            await asyncio.gather(*(one.close() for one in opened))
            return serials

    async def answer(websocket: aiohttp.ClientWebSocketResponse) -> None:
        """The server answers over it: nothing was closed."""
        assert json.loads((await websocket.receive_str())[1:])["sid"]
        await websocket.send_str(CONNECT)
        while (packet := await websocket.receive_str()) == PING:
            pass
        assert packet.startswith(CONNECTED)

    assert len(asyncio.run(hold())) == RENEWALS
    # A certificate that is not due stays.
    before = serial(fleet)
    host.check_output(f"systemctl start {UNIT}.service")
    assert serial(fleet) == before


def test_one_that_has_expired_is_told_and_renewed(host: Any, fleet: Any, ansible: Any) -> None:
    host.check_output(
        f"cd {SERVED}/.. && cp -rp served/ version.expired && openssl req -x509 -key served/key.pem -subj /CN=expired"
        f" -not_before 20200101000000Z -not_after 20200102000000Z -addext subjectAltName=DNS:{fleet.name}"
        " > version.expired/chain.pem && ln -sfn version.expired served.new && mv -T served.new served"
    )
    deadline = time.monotonic() + SERVED_SECONDS
    with pytest.raises(ssl.SSLCertVerificationError):
        while time.monotonic() < deadline:
            serial(fleet)
    verify = ("ansible-playbook", "-i", fleet.inventory, "playbooks/verify.yml")
    told = ansible(*verify, check=False)
    assert told.returncode != 0
    assert f"the certificate for {fleet.name} expired on 2020-01-02. Renew it" in " ".join(told.stdout.split())
    host.check_output(f"systemctl start {UNIT}.service")
    serial(fleet)
    ansible(*verify)


def test_one_that_cannot_be_got_ends_the_run_and_the_former_one_is_served(host: Any, fleet: Any, deploy: Any) -> None:
    def deploy_for(*names: str, **options: Any) -> Any:
        settings = json.loads((fleet.inventory / "group_vars" / "edge" / "public.json").read_text())
        listeners = settings["stickyring_edge_listeners"]
        listeners[-2]["tls"]["acme"] = names
        return deploy("-e", json.dumps({"stickyring_edge_listeners": listeners}), **options)

    before = serial(fleet)
    done = deploy_for(fleet.name, "nowhere.example.test", check=False)
    assert done.returncode != 0
    told = " ".join(done.stdout.split())
    assert f"{DIRECTORY} has given no certificate for public, and the former one is served" in told
    assert "nowhere.example.test" in told
    assert serial(fleet) == before
    deploy_for(fleet.name, f"www.{fleet.name}")
    assert serial(fleet) != before, "other names are a reason to get another one"


def test_without_it_nothing_is_left(host: Any, ansible: Any, inventory: Any) -> None:
    ansible("ansible-playbook", "-i", inventory, "playbooks/edge.yml")
    assert host.check_output("ls /var/lib /etc/stickyring-edge /etc/systemd/system | grep acme || true") == ""
    assert changed(ansible("ansible-playbook", "-i", inventory, "playbooks/edge.yml")) == {"0"}
