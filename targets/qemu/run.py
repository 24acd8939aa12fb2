#!/usr/bin/env python3
"""Builds the firmware image, boots it and has the agent in it work for a gateway on this machine.

It registers over TLS on a device whose clock starts in 1970, runs tasks, streams their output
while they run, survives a power cut, and tells how much memory it takes.
"""

import os
import random
import re
import sys
import time

from bench import PATIENCE_SECONDS, Bench, arguments
from device import Device

RESIDENT_KIB_MAX = 10 * 1024
# The journal is committed after 5 s, what is dirty written back after 30 s.
IDLE_SETTLES_SECONDS = 45
# Bulk output, so that what is measured is the agent at work; then its memory, as a task sees it.
BULK = "i=0; while [ $i -lt 20000 ]; do echo \"$i $i $i $i $i $i $i $i $i $i $i $i\"; i=$((i+1)); done"
MEMORY = "grep -E '^(VmHWM|VmRSS|RssAnon|RssFile)' /proc/$PPID/status; grep -E 'MemTotal|MemAvailable' /proc/meminfo"


def boot(bench: Bench, scheme: str) -> dict:
    bench.device = Device(bench.image, bench.disk, f"{scheme}://10.0.2.2:{bench.gateway.port}", bench.work)
    print(bench.device.wait_for("^BOOT", PATIENCE_SECONDS))
    agent = bench.gateway.wait(bench.gateway.connected, "the agent is connected", PATIENCE_SECONDS)
    print(f"connected {time.monotonic() - bench.device.started:.1f} s after power-on")
    return agent


def check_streaming(bench: Bench) -> None:
    task = bench.gateway.submit("for i in 1 2 3; do echo line $i; sleep 1; done")

    def first_line_before_end():
        info = bench.gateway.task(task)
        return info["stdout"]["bytes"] if info["result"] is None else "ended"

    seen = bench.gateway.wait(first_line_before_end, "the first line", PATIENCE_SECONDS)
    assert seen != "ended", "the output came only with the end of the task"
    streams, final = bench.gateway.output(task)
    assert streams["stdout"] == b"line 1\nline 2\nline 3\n", streams
    assert final["status"] == "completed", final
    print("streams: the first line came while the task ran")


def check_memory(bench: Bench) -> int:
    streams, final = bench.gateway.output(bench.gateway.submit(BULK))
    expected = "".join(f"{' '.join([str(i)] * 12)}\n" for i in range(20000)).encode()
    assert streams["stdout"] == expected and final["status"] == "completed", final
    print(f"streams: {len(expected)} bytes arrived as they were printed")
    report = bench.gateway.output(bench.gateway.submit(MEMORY))[0]["stdout"].decode()
    print(report, end="")
    return int(re.search(r"VmHWM:\s*(\d+) kB", report)[1])


def check_idle(bench: Bench, seconds: float) -> None:
    """How much is written while nothing runs. What the file system still had to write comes first."""
    time.sleep(IDLE_SETTLES_SECONDS)
    written, flushes = bench.disk.written_bytes, bench.disk.flushes
    time.sleep(seconds)
    written, flushes = bench.disk.written_bytes - written, bench.disk.flushes - flushes
    print(f"idle for {seconds:.0f} s: {written} bytes written to the data partition, {flushes} flushes")


def check_power_cut(bench: Bench, scheme: str) -> None:
    task = bench.gateway.submit("i=0; while :; do echo line $i; i=$((i+1)); done")
    bench.gateway.wait(lambda: bench.gateway.task(task)["stdout"]["bytes"] > 20000, "output", PATIENCE_SECONDS)
    bench.device.cut()
    print("power cut:", bench.disk.cut(random.Random(1)))
    sent = bench.gateway.task(task)["stdout"]["bytes"]
    boot(bench, scheme)
    streams, final = bench.gateway.output(task)
    count = streams["stdout"].count(b"\n")
    expected = "".join(f"line {i}\n" for i in range(count + 1)).encode()
    assert expected.startswith(streams["stdout"]) and len(streams["stdout"]) >= sent
    assert final["status"] == "interrupted", final
    print(f"survives: {sent} bytes were sent before the cut, {len(streams['stdout'])} came; {final['error']}")


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--plain", action="store_true", help="HTTP instead of TLS")
    parser.add_argument("--idle", type=float, default=0, help="seconds to watch the disk while nothing runs")
    given = parser.parse_args()
    scheme = "http" if given.plain else "https"
    with Bench(given, tls=not given.plain) as bench:
        size = os.path.getsize(os.path.join(bench.image, "root.ext4"))
        print(f"image: root file system {size >> 20} MiB, read-only")
        agent = boot(bench, scheme)
        print(f"registered as {agent['id']}")
        check_streaming(bench)
        resident = check_memory(bench)
        if given.idle:
            check_idle(bench, given.idle)
        check_power_cut(bench, scheme)
    print(f"most resident: {resident} KiB of at most {RESIDENT_KIB_MAX}")
    return 0 if resident <= RESIDENT_KIB_MAX else 1


if __name__ == "__main__":
    sys.exit(main())
