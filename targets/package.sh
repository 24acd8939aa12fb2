#!/usr/bin/env bash
# Makes a package of a built binary, with plain ar and tar: the same bytes from the same input.
#
#   targets/package.sh deb|ipk BINARY ARCH DIRECTORY
#
# ARCH is what the distribution calls it: amd64, armhf, arm64; arm_cortex-a7_neon-vfpv4, …
# The last line printed is the path of the package.
set -euo pipefail

usage() {
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 64
}
[ $# -eq 4 ] || usage
format=$1 binary=$2 arch=$3 out=$4

here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
files=$here/packages
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$root/Cargo.toml" | head -n 1)
version=${HOSTLINK_PACKAGE_VERSION:-$version}
if [ -z "${SOURCE_DATE_EPOCH:-}" ]; then
    SOURCE_DATE_EPOCH=$(git -C "$root" log -1 --format=%ct 2>/dev/null || echo 0)
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
data=$work/data control=$work/control
umask 022
mkdir -p "$data" "$control" "$out"

place() { install -D -m "$1" "$2" "$data/$3"; }
place 755 "$binary" usr/bin/hostlink-edge
place 600 "$files/hostlink.env" etc/hostlink/hostlink.env
echo /etc/hostlink/hostlink.env >"$control/conffiles"

# tar, always the same: sorted, of one date, of nobody in particular.
pack() {
    tar --sort=name --format=ustar --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 \
        --numeric-owner -C "$1" -cf - "${@:2}" | gzip -9n
}

write_control() {
    local size
    size=$(du -sk --apparent-size "$data" | cut -f 1)
    sed -e "s/@VERSION@/$version/" -e "s/@ARCH@/$arch/" -e "s/@SIZE@/$size/" \
        "$files/debian/control.in" >"$control/control"
}

package=$out/hostlink-edge_${version}_$arch.$format
rm -f "$package"
case $format in
deb)
    doc=usr/share/doc/hostlink-edge
    place 644 "$files/systemd/hostlink-edge.service" usr/lib/systemd/system/hostlink-edge.service
    place 644 "$files/systemd/sandbox.conf" "$doc/examples/sandbox.conf"
    place 755 "$files/sysv/hostlink-edge" etc/init.d/hostlink-edge
    echo /etc/init.d/hostlink-edge >>"$control/conffiles"
    place 644 "$files/debian/copyright" "$doc/copyright"
    place 644 "$files/debian/lintian-overrides" usr/share/lintian/overrides/hostlink-edge
    mkdir -p "$data/$doc"
    gzip -9nc "$root/CHANGELOG.md" >"$data/$doc/NEWS.md.gz"
    maintainer=$(sed -n 's/^Maintainer: //p' "$files/debian/control.in")
    printf 'hostlink-edge (%s) stable; urgency=medium\n\n  * See NEWS.md.gz.\n\n -- %s  %s\n' \
        "$version" "$maintainer" "$(date -u -R -d "@$SOURCE_DATE_EPOCH")" |
        gzip -9n >"$data/$doc/changelog.gz"
    for script in postinst prerm postrm; do
        install -m 755 "$files/debian/$script" "$control/$script"
    done
    write_control
    (cd "$data" && find . -type f ! -path './etc/*' -printf '%P\n' | LC_ALL=C sort |
        xargs md5sum) >"$control/md5sums"
    chmod 644 "$control"/control "$control"/conffiles "$control"/md5sums
    echo 2.0 >"$work/debian-binary"
    pack "$control" . >"$work/control.tar.gz"
    pack "$data" . >"$work/data.tar.gz"
    (cd "$work" && ar rcD package debian-binary control.tar.gz data.tar.gz)
    mv "$work/package" "$package"
    ;;
ipk)
    place 755 "$files/openwrt/hostlink-edge/files/hostlink-edge.init" etc/init.d/hostlink-edge
    write_control
    sed -i -e '/^Priority:/d' -e 's/^Installed-Size: \(.*\)/Installed-Size: \1000/' \
        "$control/control"
    for script in postinst prerm; do
        install -m 755 "$files/openwrt/hostlink-edge/files/$script" "$control/$script"
    done
    echo 2.0 >"$work/debian-binary"
    pack "$control" . >"$work/control.tar.gz"
    pack "$data" . >"$work/data.tar.gz"
    pack "$work" ./debian-binary ./data.tar.gz ./control.tar.gz >"$package"
    ;;
*) usage ;;
esac
echo "$package"
