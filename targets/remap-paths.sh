#!/bin/sh
# Called by cargo in place of rustc: maps the paths of this machine to fixed names.
rustc=$1
shift
sysroot=$("$rustc" --print sysroot)
version=$("$rustc" -vV | sed -n 's/^commit-hash: //p')
exec "$rustc" "$@" \
    --remap-path-prefix="${CARGO_TARGET_DIR:-target}=target" \
    --remap-path-prefix="${HOSTLINK_REMAP_ROOT:-.}=." \
    --remap-path-prefix="${CARGO_HOME:-$HOME/.cargo}=cargo" \
    --remap-path-prefix="$sysroot/lib/rustlib/src/rust=/rustc/$version"
