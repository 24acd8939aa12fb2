#!/usr/bin/env bash
# Fetches Debian's kernel for this machine's architecture without installing it.
#
#   fetch_kernel.sh DIR MODULE…
#
# Afterwards DIR/vmlinuz is the kernel, and DIR/modules/ holds the modules with all they need, and
# `order`, in which they have to be loaded.
set -euo pipefail
directory=$1
shift
[ ! -e "$directory/.complete" ] || exit 0
rm -rf "$directory"
mkdir -p "$directory/root" "$directory/modules"
cd "$directory"
architecture=$(dpkg --print-architecture)
kernel=$(apt-cache depends "linux-image-$architecture" | sed -n 's/.*Depends: \(linux-image-[^ ]*\).*/\1/p' | head -n 1)
[ -n "$kernel" ] || { echo "fetch_kernel.sh: no linux-image-$architecture; run apt-get update" >&2; exit 1; }
apt-get -o APT::Sandbox::User=root -o Acquire::Check-Date=false download -q "$kernel" >&2
# Drivers of hardware that no emulator has are most of the package.
dpkg-deb --fsys-tarfile ./*.deb | tar -x -C root --exclude='*/drivers/gpu' --exclude='*/drivers/media' --exclude='*/sound'
rm ./*.deb
version=$(ls root/lib/modules)
cp "root/boot/vmlinuz-$version" vmlinuz
depmod -b root "$version"
modprobe -d root -S "$version" --show-depends -a "$@" | sed -n 's/^insmod //p' | awk '!seen[$1]++ { print $1 }' |
    while read -r path; do
        cp "$path" modules/
        basename "$path" >>modules/order
    done
rm -rf root
touch .complete
