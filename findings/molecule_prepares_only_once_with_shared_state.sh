#!/bin/sh
# molecule 26.10.0: with --shared-state, the second `molecule test` of a project leaves out `prepare`.
#
# Expected: `molecule test` begins from nothing, as it does without --shared-state: prepare runs each time.
# Seen: destroy resets the state of the scenario `default` alone. Another one keeps "prepared: true" in the user's cache, under the
# name of the project's folder, so that a new clone of the same name is not prepared either. The report says that prepare was
# successful; the line "Skipping, instances already prepared." is a warning in the log.
# Ends with 0 as long as this is so.
set -eu
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
export HOME="$folder" ANSIBLE_HOME="$folder/.ansible" XDG_CACHE_HOME="$folder/.cache" PATH="$folder/venv/bin:$PATH"
python3 -m venv "$folder/venv"
pip install --quiet --disable-pip-version-check molecule==26.10.0 ansible-core==2.19.14
mkdir -p "$folder/project/molecule/default" "$folder/project/molecule/other"
cd "$folder/project"
echo '[{hosts: localhost, connection: local, gather_facts: false, tasks: []}]' > molecule/nothing.yml
echo "[{hosts: localhost, connection: local, gather_facts: false, tasks: [{ansible.builtin.file: {path: '$folder/prepared', \
state: touch}}]}]" > molecule/prepare.yml
for scenario in default other; do
    cat > "molecule/$scenario/molecule.yml" <<'YAML'
driver: {name: default}
platforms: [{name: one}]
provisioner: {playbooks: {create: ../nothing.yml, destroy: ../nothing.yml, prepare: ../prepare.yml}}
scenario: {test_sequence: [destroy, create, prepare, destroy]}
YAML
done
sed -i 's/create, prepare, destroy/create, destroy/' molecule/default/molecule.yml

test_again() {
    rm -f "$folder/prepared"
    molecule test "$@" --scenario-name default --scenario-name other > "$folder/said" 2>&1
    if [ -e "$folder/prepared" ]; then echo prepared; else echo "not prepared"; fi
}
seen="$(test_again --shared-state), $(test_again --shared-state), $(test_again)"
echo "with --shared-state, with it once more, without it: $seen"
[ "$seen" = "prepared, not prepared, prepared" ]
