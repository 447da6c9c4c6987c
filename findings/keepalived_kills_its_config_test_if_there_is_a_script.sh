#!/bin/bash
# keepalived 2.2.7 (Debian 12: 1:2.2.7-1): with a vrrp_script in the file, `keepalived --config-test` ends by sending
# itself SIGTERM, so its status is 143, for a file without a mistake and for one with a mistake alike. Its manual promises 0
# for a good file. Without a vrrp_script the status is 0, and 5 for a mistake. What validates a file by the status, such as
# Ansible's `validate`, refuses every file with a script; what takes 143 for success accepts every mistake. Only the output
# tells: nothing for a good file, a line for each mistake.
#
# Seen: plain 0, plain with a mistake 5, script 143, script with a mistake 143 and "Unknown keyword".
set -euo pipefail
VERSION=1:2.2.7-1
PACKAGES=(keepalived libnl-3-200 libnl-genl-3-200 libnl-route-3-200 libsnmp40 libsensors5 libpci3 libmnl0 libnftnl11 libglib2.0-0 libsnmp-base libsensors-config)
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
cd "$folder"
apt-get download -qq "${PACKAGES[@]}" 2>/dev/null
dpkg-deb --field keepalived_*.deb Version | grep -qF "$VERSION" || { echo "Another version of keepalived than $VERSION" >&2; exit 1; }
for package in *.deb; do dpkg-deb --extract "$package" root; done
libraries=$(find "$PWD/root" -name '*.so.*' -printf '%h\n' | sort -u | paste -sd:)

# Any but the loopback interface; it is only looked up.
interface=$(find /sys/class/net -mindepth 1 ! -name lo -printf '%f\n' | sort | head -n 1)
cat > plain.conf <<END
vrrp_instance one {
    interface $interface
    state BACKUP
    virtual_router_id 51
    priority 100
    virtual_ipaddress {
        192.0.2.100/32
    }
}
END
cat > script.conf <<'END'
global_defs {
    script_user nobody
}
vrrp_script fine {
    script "/bin/true"
    interval 1
}
END
cat plain.conf >> script.conf
for name in plain script; do sed 's/priority/importance/' $name.conf > $name-mistake.conf; done

status() {
  local status=0
  LD_LIBRARY_PATH=$libraries root/usr/sbin/keepalived --config-test --use-file "$folder/$1.conf" > "$1.said" 2>&1 || status=$?
  echo "$1: status $status, says: $(head -n 1 "$1.said")" >&2
  echo $status
}
[ "$(status plain)" = 0 ]
[ "$(status plain-mistake)" = 5 ]
[ "$(status script)" = 143 ]
[ "$(status script-mistake)" = 143 ]
[ ! -s script.said ]
grep -q 'Unknown keyword' script-mistake.said
