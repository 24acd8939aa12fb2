#!/usr/bin/env bash
# Builds for devices and tests what was built: under qemu's user emulation, and in an emulated board
# that boots, loses its network and loses its power.
#
#   targets/ci.sh HOST_BINARY
#
# HOST_BINARY runs here and has the gateway in it. A build leaves a processor free now and then, and
# an emulated board uses one: so the second is built while the first is tested.
set -euo pipefail
[ $# -eq 1 ] || {
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 64
}
host=$(realpath "$1")
cd "$(dirname "$0")/.."
armv7_bytes_max=4718592 # 4.5 MiB
log=$(mktemp)
building=
clean_up() {
    [ -z "$building" ] || kill "$building" 2>/dev/null || true
    rm -f "$log"
}
trap clean_up EXIT

step() { printf -- '-- %s (%s s so far)\n' "$*" "$SECONDS"; }

check_file() {
    if readelf -lW "$1" | grep -q INTERP; then
        echo "$1 wants shared libraries" >&2
        exit 1
    fi
    if readelf -SW "$1" | grep -q -e '\.symtab' -e '\.debug'; then
        echo "$1 is not stripped" >&2
        exit 1
    fi
    stat -c '%n: %s bytes' "$1"
}

step 'armv7 is built'
armv7=$(targets/build.sh armv7-unknown-linux-musleabihf | tail -n 1)
check_file "$armv7"
[ "$(stat -c %s "$armv7")" -le $armv7_bytes_max ] || {
    echo "armv7: more than $armv7_bytes_max bytes" >&2
    exit 1
}
targets/build.sh aarch64-unknown-linux-musl >"$log" 2>&1 &
building=$!

step 'the image: boot, TLS, streams, memory, a power cut'
targets/qemu/run.py --agent "$armv7" --gateway "$host"
step 'network faults'
targets/qemu/network.py --agent "$armv7" --gateway "$host" --away 12
step 'power cuts'
targets/qemu/power_cuts.py --agent "$armv7" --gateway "$host" 6
step 'armv7 under qemu-user'
targets/qemu_user.sh "$armv7"

step 'aarch64 is built'
wait "$building" || {
    cat "$log" >&2
    exit 1
}
building=
aarch64=$(tail -n 1 "$log")
check_file "$aarch64"
step 'aarch64 under qemu-user'
targets/qemu_user.sh "$aarch64" final_texts reconnect_replays restart_in_each_state runs_once tls_private_ca
step 'done'
