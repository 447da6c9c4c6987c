#!/bin/sh
# Builds what a virtual machine boots: Debian's kernel and initrd, and a disk with a lab host that brings its keys along.
# usage: build_disk.sh SUITE FOLDER [PACKAGE ...]
# FOLDER must be empty. It then has vmlinuz, initrd.img, disk.raw, the key that opens the machine, and its host key's public half.
set -eu
suite=$1
folder=$2
shift 2
root=$folder/root

sh "$(dirname "$0")/build_image.sh" "$suite" "$folder/image.tar" linux-image-amd64 initramfs-tools "$@"
mkdir -m 755 "$root"
tar --extract --numeric-owner --directory "$root" --file "$folder/image.tar"

# The name and the address are given when the machine is started, as arguments of the kernel.
rm -f "$root/etc/hostname" "$root/etc/resolv.conf"
printf '127.0.0.1 localhost\n::1 localhost\n' >"$root/etc/hosts"
printf '/dev/vda / ext4 defaults 0 1\n' >"$root/etc/fstab"
systemctl --quiet --root="$root" enable systemd-network-generator.service systemd-networkd.service

ssh-keygen -q -t ed25519 -N '' -C stickyring-vm -f "$folder/deploy_key"
install -d -m 755 "$root/etc/ssh/lab"
ssh-keygen -q -t ed25519 -N '' -C stickyring-vm -f "$root/etc/ssh/lab/host_key"
cp "$folder/deploy_key.pub" "$root/etc/ssh/lab/authorized_keys"
cp "$root/etc/ssh/lab/host_key.pub" "$folder"

cp "$root"/boot/vmlinuz-* "$folder/vmlinuz"
cp "$root"/boot/initrd.img-* "$folder/initrd.img"
# Sparse: a deployed edge takes 2 GiB of it.
mkfs.ext4 -q -d "$root" "$folder/disk.raw" 6G
rm -rf "$root" "$folder/image.tar"
