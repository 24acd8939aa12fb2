#!/usr/bin/env bash
# Makes the firmware image: a kernel, an initramfs that mounts the root file system, and that root.
#
#   image.sh AGENT DIR
#
# DIR afterwards holds `vmlinux.uimage`, `initramfs` and `root.ext4`. AGENT is the armv7 binary. Nothing of
# this needs root. The kernel and busybox are Debian's and are kept in HOSTLINK_IMAGE_DEBIAN (default:
# DIR/debian). HOSTLINK_IMAGE_CA_FILE goes into the image as the authority that the agent trusts.
set -euo pipefail
agent=$(realpath "$1")
mkdir -p "$2"
directory=$(realpath "$2")
here=$(cd "$(dirname "$0")" && pwd)

packages=${HOSTLINK_IMAGE_DEBIAN:-$directory/debian}
"$here/fetch_debian.sh" "$packages"
debian=$packages/root
version=$(ls "$debian/lib/modules")
work=$(mktemp -d "$directory/work.XXXXXX")
trap 'rm -rf "$work"' EXIT

depmod -b "$debian" "$version"
# The paths of a module and of all it needs, in the order in which they have to be loaded.
modules() {
    modprobe -d "$debian" -S "$version" --show-depends -a "$@" | sed -n 's/^insmod //p' | awk '!seen[$1]++ { print $1 }'
}
install_modules() {
    local root=$1
    shift
    mkdir -p "$root/modules"
    modules "$@" | while read -r path; do
        cp "$path" "$root/modules/"
        basename "$path" >>"$root/modules/order"
    done
}

# The initramfs loads what the root file system needs and goes there.
initramfs=$work/initramfs
mkdir -p "$initramfs"/{bin,dev,sys,root}
cp "$debian/bin/busybox" "$initramfs/bin/"
cp "$here/files/initramfs_init" "$initramfs/init"
chmod 755 "$initramfs/init"
install_modules "$initramfs" virtio_mmio virtio_blk ext4
(cd "$initramfs" && find . | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0) | gzip -1n >"$directory/initramfs"

# The root file system, never written to on the device.
root=$work/root
mkdir -p "$root"/{bin,sbin,dev,proc,sys,tmp,run,data,usr/bin,etc/hostlink}
cp "$debian/bin/busybox" "$root/bin/"
for name in $(qemu-arm-static "$debian/bin/busybox" --list); do
    [ "$name" = busybox ] || ln -s busybox "$root/bin/$name"
done
ln -s ../bin/busybox "$root/sbin/init"
cp "$agent" "$root/usr/bin/hostlink-edge"
cp "$here/files/rcS" "$here/files/inittab" "$here/files/agent" "$root/etc/"
echo 'root:x:0:0:root:/:/bin/sh' >"$root/etc/passwd"
echo 'root:x:0:' >"$root/etc/group"
if [ -n "${HOSTLINK_IMAGE_CA_FILE:-}" ]; then
    cp "$HOSTLINK_IMAGE_CA_FILE" "$root/etc/hostlink/ca.pem"
fi
chmod 755 "$root/etc/rcS" "$root/etc/agent"
install_modules "$root" virtio_net sch_netem
rm -f "$directory/root.ext4"
mke2fs -q -t ext4 -O ^has_journal -E root_owner=0:0 -L root -d "$root" "$directory/root.ext4" 24M
python3 "$here/unpack_kernel.py" "$debian/boot/vmlinuz-$version" "$directory/vmlinux.uimage"
