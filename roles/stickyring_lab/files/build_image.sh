#!/bin/sh
# Builds the image of a lab host: a bare Debian with systemd and SSH, like a fresh VM.
# usage: build_image.sh SUITE TARBALL [PACKAGE ...]
# Uses the mirror and the certificates of this machine.
set -eu
suite=$1
tarball=$2
shift 2

mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Label: Debian' | head -n 1)
[ -n "$mirror" ] || { echo "apt knows no Debian mirror: run apt-get update" >&2; exit 1; }
source="deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main"

hook=$(mktemp)
trap 'rm -f "$hook" "$tarball.partial"' EXIT
cat >"$hook" <<'HOOK'
#!/bin/sh
set -eu
root=$1
# A host without a kernel is a container: systemd-modules-load cannot work there and would leave it "degraded".
[ -d "$root/lib/modules" ] || ln -s /dev/null "$root/etc/systemd/system/systemd-modules-load.service"
rm -f "$root"/etc/ssh/ssh_host_*
cat >"$root/etc/ssh/sshd_config.d/lab.conf" <<'SSHD'
HostKey /etc/ssh/lab/host_key
AuthorizedKeysFile /etc/ssh/lab/authorized_keys
PasswordAuthentication no
SSHD
chroot "$root" useradd --create-home --shell /bin/bash deploy
echo 'deploy ALL=(ALL) NOPASSWD: ALL' >"$root/etc/sudoers.d/deploy"
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
HOOK
chmod +x "$hook"

mmdebstrap --quiet --format=tar --variant=minbase \
    --include=systemd,systemd-sysv,dbus,openssh-server,python3,sudo,iproute2,ca-certificates,procps \
    ${1:+--include="$*"} \
    --customize-hook="$hook \"\$1\"" \
    "$suite" "$tarball.partial" "$source"
mv "$tarball.partial" "$tarball"
