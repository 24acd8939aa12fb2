#!/usr/bin/env bash
# Breaks the agent on purpose, one patch of tests/mutations/ at a time, in a copy, and tells which seed
# of the simulation notices. `tests/mutations.sh [NAME…]`; without names all of them.
#   HOSTLINK_AGENT_HISTORIES=n  histories for each (10,000)
#   CARGO_TARGET_DIR=path       where to build (target: dependencies are there already)
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$root/target}
export HOSTLINK_AGENT_HISTORIES=${HOSTLINK_AGENT_HISTORIES:-10000}
export RUST_BACKTRACE=0
# From one patch to the next little is compiled.
export CARGO_INCREMENTAL=1
names=("$@")
if [ ${#names[@]} -eq 0 ]; then
    for patch in tests/mutations/*.patch; do names+=("$(basename "$patch" .patch)"); done
fi
tar -c --exclude=./target --exclude=./.git . | tar -x -C "$copy"
cd "$copy"
simulate() { cargo test --config tests/optimised.toml --lib -q agent::simulation::whatever -- --nocapture; }
missed=0
for name in "${names[@]}"; do
    patch=$root/tests/mutations/$name.patch
    log=$copy/$name.log
    patch -p1 -s -F0 --no-backup-if-mismatch <"$patch"
    if simulate >"$log" 2>&1; then
        missed=$((missed + 1))
        printf '%-32s not noticed in %s histories\n' "$name" "$HOSTLINK_AGENT_HISTORIES"
    elif grep -q 'repeats this failure' "$log"; then
        seed=$(sed -n 's/.*HOSTLINK_AGENT_SEED=\([0-9]*\).*/\1/p' "$log" | sort -n | head -1)
        why=$(grep -A1 'panicked at' "$log" | sed -n 2p)
        printf '%-32s noticed by seed %s: %s\n' "$name" "$seed" "$why"
    else
        missed=$((missed + 1))
        tail -5 "$log"
        printf '%-32s does not build\n' "$name"
    fi
    patch -p1 -s -F0 -R --no-backup-if-mismatch <"$patch"
done
exit $((missed > 0))
