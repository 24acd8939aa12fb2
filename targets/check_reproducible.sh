#!/usr/bin/env bash
# Builds TRIPLE twice, in two directories of different names, and compares the bytes.
#
#   targets/check_reproducible.sh TRIPLE
#
# Nothing is shared but the downloaded crates and tools. Takes twice as long as a cold build.
set -euo pipefail
[ $# -eq 1 ] || {
    sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
    exit 64
}
root=$(dirname "$(cd "$(dirname "$0")" && pwd)")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
SOURCE_DATE_EPOCH=$(git -C "$root" log -1 --format=%ct)
export SOURCE_DATE_EPOCH

for tree in "$work/a" "$work/another-directory/b"; do
    mkdir -p "$tree"
    git -C "$root" archive HEAD | tar -x -C "$tree"
    # Whatever this machine has set for its own builds would hide a difference.
    env -u CARGO_TARGET_DIR -u HOSTLINK_CROSS_TARGET_DIR "$tree/targets/build.sh" "$1" >"$tree.path"
    cp "$(cat "$tree.path")" "$tree.binary"
    rm -rf "$tree"
done
cmp "$work/a.binary" "$work/another-directory/b.binary"
! grep -q -a "$work" "$work/a.binary" || {
    echo "the binary holds the path of its build" >&2
    exit 1
}
sha256sum <"$work/a.binary"
echo "$1: two builds, the same $(stat -c %s "$work/a.binary") bytes"
