#!/bin/sh
# ansible-core 2.19.14: each use of the lookup `template` copies all variables of the host, also those that the template does not use.
#
# Expected: a template that uses one variable takes the same time whatever else the inventory says.
# Seen: beside a variable with 20 000 entries that nothing uses, 20 such lookups take several times as long (copy.deepcopy of all
# variables, in the lookup). The same text as a variable, which is a template too, takes as long as without it. A role pays that too for a
# branch that is not taken, because Ansible renders each variable that a template names.
# Ends with 0 as long as this is so.
set -eu
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
export HOME="$folder" ANSIBLE_HOME="$folder/.ansible" ANSIBLE_LOCALHOST_WARNING=false
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ansible-core==2.19.14
mkdir "$folder/templates"
echo 'It is {{ colour }}.' > "$folder/templates/text.j2"
python3 -c 'import json; print(json.dumps({"unused": [{"name": str(n)} for n in range(20000)]}))' > "$folder/many.json"
echo '{"unused": []}' > "$folder/none.json"
play() {
    cat > "$folder/$1.yml" <<YAML
- hosts: localhost
  gather_facts: false
  vars:
    colour: green
    text: It is {{ colour }}.
  tasks:
    - ansible.builtin.assert:
        that: $2 is match('It is green')
      loop: "{{ range(20) | list }}"
YAML
}
play lookup "lookup('template', 'text.j2')"
play variable text
python3 - "$folder" <<'PYTHON'
import resource, subprocess, sys

folder = sys.argv[1]


def seconds(play, others):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [f"{folder}/venv/bin/ansible-playbook", f"{folder}/{play}.yml", "-e", f"@{folder}/{others}.json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


seconds("variable", "none")
more = {}
for play in ("lookup", "variable"):
    alone, beside = seconds(play, "none"), seconds(play, "many")
    more[play] = beside - alone
    print(f"20 times by a {play}: {alone:.2f} s of CPU, beside 20 000 unused entries {beside:.2f} s")
sys.exit(not more["lookup"] > 4 * max(more["variable"], 0.2))
PYTHON
