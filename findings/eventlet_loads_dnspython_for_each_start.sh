#!/bin/sh
# eventlet 0.41.3 with dnspython 2.9.2: `import eventlet` loads all of dnspython, records for DNSSEC included, before any name is resolved.
#
# Expected: what resolves names is loaded when the first name is resolved; most services behind a proxy resolve none.
# Seen: over 60 modules of dnspython, and more than half of the import's CPU time. With EVENTLET_NO_GREENDNS=yes, none is loaded; then
# names are resolved in the calling thread, so a slow one keeps all green threads waiting.
# Ends with 0 as long as this is so.
set -eu
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
export HOME="$folder"
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check eventlet==0.41.3 dnspython==2.9.2
"$folder/venv/bin/python" - <<'PYTHON'
import os, resource, statistics, subprocess, sys

COUNT = "import eventlet, sys; print(sum(name.startswith('dns.') for name in sys.modules))"


def start(**more):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    modules = subprocess.run([sys.executable, "-c", COUNT], env=os.environ | more, check=True, capture_output=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, int(modules)


start()
rounds = [(start(), start(EVENTLET_NO_GREENDNS="yes")) for _ in range(5)]
seconds = [statistics.median(one[which][0] for one in rounds) for which in (0, 1)]
modules = [rounds[0][which][1] for which in (0, 1)]
print(f"{modules[0]} modules of dnspython, {seconds[0]:.2f} s of CPU; with EVENTLET_NO_GREENDNS {modules[1]}, {seconds[1]:.2f} s")
sys.exit(not (modules[0] > 60 and modules[1] == 0 and seconds[0] > 1.5 * seconds[1]))
PYTHON
