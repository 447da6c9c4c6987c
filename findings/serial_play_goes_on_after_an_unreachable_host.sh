#!/bin/sh
# ansible-core 2.19.14: `any_errors_fatal` does not stop a `serial` play for a host that cannot be reached.
#
# Expected: as for a task that fails, the play ends after the batch, and the playbook with it.
# Seen: the next batch and the next play run on the other hosts, and the run ends with code 4. The host counts as unreachable and,
# for any_errors_fatal, as failed too; the executor compares that sum with the size of the batch and finds it different.
# Ends with 0 as long as this is so.
set -eu
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ansible-core==2.19.14
# Nothing listens on port 1 of this machine.
cat > "$folder/hosts.yml" <<HOSTS
all:
  hosts:
    lost: {ansible_connection: ssh, ansible_host: 127.0.0.1, ansible_port: 1}
    fails: {ansible_connection: local}
    next: {ansible_connection: local}
HOSTS
cat > "$folder/play.yml" <<'PLAY'
- hosts: "{{ first }},next"
  gather_facts: false
  any_errors_fatal: true
  serial: 1
  tasks:
    - ansible.builtin.raw: "exit {{ 1 if inventory_hostname == 'fails' else 0 }}"
    - ansible.builtin.debug: {msg: "touched {{ inventory_hostname }}"}
PLAY
for first in fails lost; do
  code=0
  ANSIBLE_NOCOLOR=1 "$folder/venv/bin/ansible-playbook" -i "$folder/hosts.yml" -e "first=$first" "$folder/play.yml" > "$folder/$first" 2>&1 || code=$?
  if grep -q 'touched next' "$folder/$first"; then next=touched; else next='left alone'; fi
  echo "the first host $first: code $code, the next host is $next"
  eval "$first='$code $next'"
done
# shellcheck disable=SC2154
[ "$fails" = '2 left alone' ] && [ "$lost" = '4 touched' ]
