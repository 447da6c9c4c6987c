#!/bin/sh
# ansible-core 2.19.14: a Jinja template is compiled anew each time it is used, also those in variables that refer to variables.
#
# Expected: compiled once in a process, as Jinja does for templates that it loads itself.
# Seen: 100 uses of a variable that refers to another one compile their three templates 300 times, which takes three quarters of the time.
# A role whose defaults refer to each other pays this for each task and host.
# Ends with 0 as long as this is so.
set -eu
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
export HOME="$folder" ANSIBLE_HOME="$folder/.ansible"
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ansible-core==2.19.14
"$folder/venv/bin/python" - <<'PYTHON'
import time

import jinja2
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template

USES = 100
compile_one, sources, seconds = jinja2.Environment.compile, [], 0.0


def counted(self, source, *arguments, **options):
    global seconds
    began = time.process_time()
    try:
        return compile_one(self, source, *arguments, **options)
    finally:
        seconds += time.process_time() - began
        sources.append(str(source))


jinja2.Environment.compile = counted
variables = {"name": trust_as_template("{{ short }}.{{ short }}"), "short": trust_as_template("{{ plain | upper }}"), "plain": "edge"}
templar = Templar(loader=DataLoader(), variables=variables)
templar.template(trust_as_template("{{ name }}"))
sources.clear()
seconds, began = 0.0, time.process_time()
for _ in range(USES):
    assert templar.template(trust_as_template("{{ name }}")) == "EDGE.EDGE"
share = seconds / (time.process_time() - began)
print(f"{USES} uses: {len(sources)} compilations of {len(set(sources))} templates, {share:.0%} of the time")
assert (len(sources), len(set(sources))) == (3 * USES, 3)
assert share > 0.5
PYTHON
