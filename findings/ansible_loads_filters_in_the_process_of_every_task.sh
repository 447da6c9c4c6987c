#!/bin/sh
# ansible-core 2.19.14: a filter plugin is loaded anew in the process of every task, unless the play's own keywords use a filter.
#
# Expected: the controller loads it once, and the processes that it forks for the tasks have it.
# Seen: each of four tasks loads it, with all filters of Ansible itself (0.05 to 0.1 s a task and host). When `hosts` is a template
# with any filter, the controller has loaded them before it forks, and none of the four does.
# Ends with 0 as long as this is so.
set -eu
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
export HOME="$folder" ANSIBLE_HOME="$folder/.ansible" ANSIBLE_LOCALHOST_WARNING=false LOADED="$folder/loaded"
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ansible-core==2.19.14
mkdir "$folder/filter_plugins"
cat > "$folder/filter_plugins/doubled.py" <<'PYTHON'
import os

with open(os.environ["LOADED"], "a") as file:
    file.write(f"{os.getpid()}\n")


class FilterModule:
    def filters(self):
        return {"doubled": lambda number: 2 * number}
PYTHON
loads() {
    : > "$LOADED"
    {
        echo "- hosts: $1"
        echo "  connection: local"
        echo "  gather_facts: false"
        echo "  tasks:"
        for task in 1 2 3 4; do echo "    - ansible.builtin.assert: {that: $task | doubled == 2 * $task}"; done
    } > "$folder/play.yml"
    "$folder/venv/bin/ansible-playbook" "$folder/play.yml" > /dev/null
    sort -u "$LOADED" | wc -l
}
seen="$(loads localhost) $(loads "\"{{ ['localhost'] | first }}\"")"
echo "processes that have loaded it, hosts given as a word and as a template with a filter: $seen"
[ "$seen" = "4 1" ]
