#!/usr/bin/env bash
# Builds the agent for a device: static, stripped, the same bytes from any directory.
#
#   targets/build.sh TRIPLE [CARGO ARGUMENT …]
#
# TRIPLE is armv7-unknown-linux-musleabihf, aarch64-unknown-linux-musl, x86_64-unknown-linux-musl,
# arm-unknown-linux-musleabihf (ARMv6) or riscv64gc-unknown-linux-musl. The last line printed is
# the path of the binary. Without further arguments the firmware build is made, without gateway.
#
# C compiler, libc and linker are zig's, so that one package of PyPI serves every target. Where
# rustup has no standard library for the target, it is built from its source.
set -euo pipefail

# Versions from 0.16 zero what calloc returns: sled's histograms would be resident, 29 MiB with them.
zig_version=0.15.2
zigbuild_version=0.24.0

usage() {
    sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
    exit 64
}

[ $# -ge 1 ] || usage
triple=$1
shift
case $triple in
armv7-unknown-linux-musleabihf | arm-unknown-linux-musleabihf) ;;
aarch64-unknown-linux-musl | x86_64-unknown-linux-musl | i686-unknown-linux-musl) ;;
riscv64gc-unknown-linux-musl) ;;
*) usage ;;
esac
if [ $# -gt 0 ]; then
    arguments=("$@")
else
    arguments=(--no-default-features --features vendored-openssl)
fi

here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
cd "$root"
export PATH="${CARGO_HOME:-${HOME:-}/.cargo}/bin:$PATH"
# Of its own, so that builds for the host do not evict what these have built, or the other way.
export CARGO_TARGET_DIR="${HOSTLINK_CROSS_TARGET_DIR:-${CARGO_TARGET_DIR:-$root/target}/cross}"
export CARGO_INCREMENTAL=0

tools=$CARGO_TARGET_DIR/tools-zig-$zig_version-$zigbuild_version
if [ ! -x "$tools/bin/cargo-zigbuild" ]; then
    rm -rf "$tools"
    python3 -m venv "$tools" >&2
    "$tools/bin/pip" install -q --disable-pip-version-check \
        "ziglang==$zig_version" "cargo-zigbuild==$zigbuild_version" >&2
fi
export PATH="$tools/bin:$PATH"

rustc_flags=()
cargo_flags=()
if rustup target list --installed 2>/dev/null | grep -qx "$triple" ||
    rustup target add "$triple" >/dev/null 2>&1; then
    echo "targets/build.sh: $triple: the standard library comes from rustup" >&2
else
    echo "targets/build.sh: $triple: rustup has no standard library for it; built from rust-src" >&2
    if [ ! -d "$(rustc --print sysroot)/lib/rustlib/src/rust/library" ]; then
        rustup component add rust-src >&2
    fi
    export RUSTC_BOOTSTRAP=1
    cargo_flags+=("-Zbuild-std=std,panic_unwind"
        "-Zbuild-std-features=panic-unwind,optimize_for_size")
    # There is no musl beside a standard library that was not installed; zig brings its own.
    rustc_flags+=(-Clink-self-contained=no)
fi

c_flags="-Os -ffunction-sections -fdata-sections"
case $triple in
armv7-*)
    # Every ARMv7 core has Thumb-2: a quarter less code.
    rustc_flags+=(-Ctarget-feature=+thumb-mode)
    c_flags="$c_flags -mthumb"
    ;;
esac

# No path of this machine may stand in the binary. The wrapper adds the mappings where cargo does
# not see them: they would enter the names of symbols by way of cargo's hash of the flags.
export HOSTLINK_REMAP_ROOT=$root
export RUSTC_WRAPPER=$here/remap-paths.sh
RUSTFLAGS="${rustc_flags[*]:-}"
export RUSTFLAGS

# OpenSSL: by size, without what the agent never uses, and without paths and dates.
export OPENSSL_SRC_PERL=$here/openssl-perl.sh
# zig adds debugging information unless it is told not to.
export CFLAGS="$c_flags -g0"
if [ -z "${SOURCE_DATE_EPOCH:-}" ]; then
    SOURCE_DATE_EPOCH=$(git -C "$root" log -1 --format=%ct 2>/dev/null || echo 0)
fi
export SOURCE_DATE_EPOCH

cargo zigbuild --release --locked --target "$triple" \
    ${cargo_flags[@]+"${cargo_flags[@]}"} "${arguments[@]}" >&2

binary=$CARGO_TARGET_DIR/$triple/release/hostlink-edge
echo "$binary"
