#!/usr/bin/env bash
# Runs behaviour tests against a binary for another processor, under qemu's user emulation.
#
#   targets/qemu_user.sh BINARY [TEST …]
#
# Without names those run that cover the whole job in a few minutes. The agent starts itself again
# (to check its index, and to become a task), so the kernel has to know the emulator: this registers
# it with binfmt_misc for as long as the machine is up, which needs root.
set -euo pipefail
[ $# -ge 1 ] || {
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 64
}
binary=$(realpath "$1")
shift
cd "$(dirname "$0")/.."

processor=$(readelf -h "$binary" | sed -n 's/^ *Machine: *//p')
case $processor in
ARM) name=qemu-arm ;;
AArch64) name=qemu-aarch64 ;;
RISC-V) name=qemu-riscv64 ;;
*)
    echo "qemu_user.sh: no emulator for $processor" >&2
    exit 64
    ;;
esac
registry=/proc/sys/fs/binfmt_misc
if [ ! -e $registry/$name ]; then
    [ -e $registry/register ] || mount -t binfmt_misc binfmt_misc $registry
    # Of Debian's package qemu-user-static, with the flag that keeps the emulator open.
    cat /usr/lib/binfmt.d/$name.conf >$registry/register
fi
"$binary" --version

if [ $# -eq 0 ]; then
    # Left out: what is measured (memory, times), what strace or a sandbox does to the process, and
    # the long series.
    set -- ack_removes_exactly_that_message bad_commands clock_offset delivery_answers \
        fallback_report final_texts gap_error hello_directives poison_message queue \
        reconnect_replays_same_messages registration restart_in_each_state runs_once \
        sigterm_stops_cleanly task_surroundings tls_private_ca volatile_store window
fi
HOSTLINK_TEST_SLOWDOWN=5 HOSTLINK_TEST_BINARY=$binary cargo test --test behaviour -- "$@"
