#!/usr/bin/env bash
# Breaks the agent on purpose, one patch of tests/mutations/ at a time, in a copy, and tells after how
# many histories the simulation notices. `tests/mutations.sh [NAME…]`; without names all of them.
#   HOSTLINK_AGENT_HISTORIES=n  histories for each (10,000)
#   CARGO_TARGET_DIR=path       where to build (target/mutations)
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$root/target/mutations}
export HOSTLINK_AGENT_HISTORIES=${HOSTLINK_AGENT_HISTORIES:-10000}
export RUST_BACKTRACE=0
# Optimised, but quick to build, and with all assertions.
export CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16
export CARGO_PROFILE_RELEASE_OPT_LEVEL=2 CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS=true
names=("$@")
if [ ${#names[@]} -eq 0 ]; then
    for patch in tests/mutations/*.patch; do names+=("$(basename "$patch" .patch)"); done
fi
tar -c --exclude=./target --exclude=./.git . | tar -x -C "$copy"
survivors=0
for name in "${names[@]}"; do
    patch=$root/tests/mutations/$name.patch
    (cd "$copy" && patch -p1 -s <"$patch")
    log=$copy/$name.log
    if (cd "$copy" && cargo test --release --lib -q agent::simulation::whatever -- --nocapture) >"$log" 2>&1; then
        survivors=$((survivors + 1))
        printf '%-32s SURVIVES %s histories\n' "$name" "$HOSTLINK_AGENT_HISTORIES"
    elif grep -q 'repeats this failure' "$log"; then
        seed=$(grep -o 'HOSTLINK_AGENT_SEED=[0-9]*' "$log" | sort -t= -k2 -n | head -1 | cut -d= -f2)
        why=$(grep -A1 'panicked at' "$log" | sed -n 2p)
        printf '%-32s caught by seed %s: %s\n' "$name" "$seed" "$why"
    else
        tail -5 "$log"
        printf '%-32s does not build\n' "$name"
        survivors=$((survivors + 1))
    fi
    (cd "$copy" && patch -p1 -s -R <"$patch")
done
exit $((survivors > 0))
