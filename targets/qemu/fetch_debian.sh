#!/usr/bin/env bash
# Fetches Debian's armhf kernel and busybox without installing them, and unpacks them into DIR.
#
#   fetch_debian.sh DIR
#
# The package lists are apt's own, kept in DIR: neither root nor a foreign architecture of the host's
# dpkg is needed. Afterwards DIR/root holds boot/, lib/modules/ and bin/busybox.
set -euo pipefail
directory=$1
[ ! -e "$directory/root/.complete" ] || exit 0
rm -rf "$directory"
mkdir -p "$directory/lists/partial" "$directory/cache/archives/partial" "$directory/root"
cd "$directory"

options=(
    -o APT::Architecture=armhf -o APT::Architectures::=armhf
    -o Dir::State::Lists="$directory/lists" -o Dir::State::status=/dev/null
    -o Dir::Cache="$directory/cache" -o Debug::NoLocking=1 -o APT::Sandbox::User=root
    # A machine whose clock is behind still gets its packages.
    -o Acquire::Check-Date=false
)
# A list that cannot be had just now (a mirror in the middle of its update) need not be the one with
# the kernel: the next lines tell.
apt-get "${options[@]}" -o Acquire::Retries=3 update -q >&2 || true
kernel=$(apt-cache "${options[@]}" depends linux-image-armmp | sed -n 's/.*Depends: \(linux-image-[^:]*\).*/\1/p' | head -n 1)
[ -n "$kernel" ] || { echo "fetch_debian.sh: no armhf kernel package in the lists" >&2; exit 1; }
apt-get "${options[@]}" download -q "$kernel" busybox-static >&2
for package in ./*.deb; do
    dpkg-deb -x "$package" root
    rm "$package"
done
rm -rf lists cache
touch root/.complete
