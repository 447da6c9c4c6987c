"""Stand-ins for Ansible, pytest and `stickyring status`, without hosts, and the command that measures with them."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = ("ansible", "ansible-playbook", "pytest", "stickyring")
ANSIBLE = f"""#!{sys.executable}
import json, sys, time, yaml
from pathlib import Path
folder = Path(__file__).parent
if Path(sys.argv[0]).name == "pytest":
    print("pytest", *sys.argv[1:-1], file=(folder / "played").open("a"))
    if not (folder / "fails").exists():
        costs = {{"median": 1.5, "p99": 2.5, "last": 2.75, "bound": 3, "users": 90}}
        found = {{"killed process": costs | {{"unit": "s"}}, "killed process, again": costs | {{"unit": "tries"}}}}
        (folder / "found").write_text(json.dumps(found))
    sys.exit()
if Path(sys.argv[0]).name == "stickyring":
    inventory, playbook = Path(sys.argv[3]), sys.argv[1]
else:
    inventory, playbook = Path(sys.argv[2]), Path(sys.argv[3]).stem
groups = yaml.safe_load((inventory / "hosts.yml").read_text())
hosts = [host for group in groups.values() for host in group["hosts"]]
owner, deployed = folder / "owner", folder / "deployed"
had = deployed.read_text().split() if deployed.exists() else []
with (folder / "played").open("a") as played:
    print(playbook, len(hosts) - 1, *sys.argv[4:], file=played)
if playbook == "status":
    sys.exit((folder / "unwell").exists())
if playbook == "all":
    for host in hosts:
        print(host, "| SUCCESS =>")
    sys.exit()
changed = []
if playbook == "create":
    owner.write_text({str(ROOT)!r})
elif playbook == "destroy":
    owner.unlink()
    deployed.unlink(missing_ok=True)
elif playbook == "site":
    if (folder / "hangs").exists():
        time.sleep(60)
    if (folder / "is faulty").exists():
        print("fatal: [node1]: FAILED! =>")
        sys.exit(2)
    changed = [host for host in hosts if host not in had]
    if had and (folder / "restless").exists():
        changed = ["node1"]
    deployed.write_text(" ".join(hosts))
elif playbook == "rolling_update":
    changed = hosts[1:]
print("PLAY [", playbook, "] ****", flush=True)
print("TASK [" + playbook + " : Work | rest] ****", flush=True)
time.sleep(0.01 * len(hosts))
print("PLAY RECAP ****", flush=True)
for host in hosts:
    print(host, "    : ok=3    changed=" + str(int(host in changed)), "   unreachable=0")
"""
DRIVER = """
import sys
from pathlib import Path
from bench import __main__, faults, lab, operations
folder = Path(sys.argv.pop(1))
lab.PROGRAMS, lab.LAB_OWNER = folder, folder / "owner"
faults.FOUND = folder / "found"
operations.PROFILES["quick"] = operations.Profile(1, (3, 6), 2, (3,))
__main__.main(prog_name="bench")
"""


def command(programs: Path, part: str) -> list[str]:
    """Return the command that measures a part with these programs."""
    return [sys.executable, "-c", DRIVER, str(programs), part, "--output", str(programs / "output")]


def run(programs: Path, part: str) -> subprocess.CompletedProcess[str]:
    """Measure a part to its end."""
    return subprocess.run(command(programs, part), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def told(stderr: str) -> list[str]:
    """Return the lines of standard error besides progress."""
    return [line for line in stderr.splitlines() if not line.lstrip()[:1].isdigit()]
