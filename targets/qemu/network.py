#!/usr/bin/env python3
"""Boots the device with network faults and checks what the agent makes of them, over TLS.

Its clock starts in 1970; frames get lost and come late; the cable is unplugged, for longer than the
session lasts, and plugged in again; it starts after January 2038 because a server has once told such a
time, and comes back to the present when the server tells that.
"""

import sys
import time

from bench import PATIENCE_SECONDS, Bench, arguments
from cable import Cable
from device import Device

# From the link's return to the next byte of a task's output at the gateway.
RETURN_SECONDS_MAX = 2.0
LOSS, DELAY_SECONDS = 0.05, 0.1
# Lost sooner than it is by default: the test need not take minutes.
SETTINGS = {"HOSTLINK_WS_PING_INTERVAL": "5s"}
AFTER_2038 = 2_190_000_000  # May 2039
LINES = 3000
BULK = f"i=0; while [ $i -lt {LINES} ]; do echo \"line $i of a text that is long enough\"; i=$((i+1)); done"
TICKS = "i=0; while :; do echo $i; i=$((i+1)); usleep 100000; done"


def boot(bench: Bench, cable: Cable) -> Device:
    url = f"https://10.0.2.2:{bench.gateway.port}"
    bench.device = Device(bench.image, bench.disk, url, bench.work, SETTINGS, cable)
    print(bench.device.wait_for("^BOOT", PATIENCE_SECONDS))
    bench.gateway.wait(bench.gateway.connected, "the agent is connected", PATIENCE_SECONDS)
    return bench.device


def check_clock(device: Device) -> None:
    line = device.wait_for("the system clock stood at", PATIENCE_SECONDS)
    print(f"clock: {line}")


def check_loss(bench: Bench, cable: Cable) -> None:
    cable.set(LOSS, DELAY_SECONDS)
    begun = time.monotonic()
    streams, final = bench.gateway.output(bench.gateway.submit(BULK))
    expected = "".join(f"line {i} of a text that is long enough\n" for i in range(LINES)).encode()
    assert streams["stdout"] == expected and final["status"] == "completed", final
    assert cable.lost, "no frame was lost"
    print(
        f"loss and delay: {len(expected)} bytes arrived in {time.monotonic() - begun:.1f} s,"
        f" {cable.lost} of {cable.lost + cable.passed} frames were lost"
    )
    cable.set(0.0, 0.0)


def check_link(bench: Bench, away_seconds: float) -> float:
    """Unplugs and plugs in again. Returns how long after that the output of a task goes on."""
    gateway = bench.gateway
    task = gateway.submit(TICKS)

    def arrived() -> int:
        return gateway.task(task)["stdout"]["bytes"]

    gateway.wait(arrived, "output", PATIENCE_SECONDS)
    lines = len(bench.device.lines)
    bench.device.set_link(False)
    time.sleep(away_seconds)
    before = arrived()
    gone = any("disconnected" in line for _, line in bench.device.lines[lines:])
    plugged = time.monotonic()
    bench.device.set_link(True)
    gateway.wait(lambda: arrived() > before, "output after the return", PATIENCE_SECONDS)
    took = time.monotonic() - plugged
    gateway.ask("POST", f"tasks/{task}/cancel", {})
    gateway.output(task)
    told = "had ended" if gone else "was still there"
    print(f"link away for {away_seconds:.0f} s: output after {took:.2f} s; the session {told}")
    return took


def check_far_ahead(bench: Bench, cable: Cable) -> None:
    _, final = bench.gateway.output(bench.gateway.submit(f"printf %s {AFTER_2038} >/data/hostlink/server-time; sync"))
    assert final["status"] == "completed", final
    bench.device.cut()
    device = boot(bench, cable)
    line = device.wait_for("INFO  connected", PATIENCE_SECONDS)
    assert line.startswith("2039-05-"), line
    streams, final = bench.gateway.output(bench.gateway.submit("echo still here"))
    assert streams["stdout"] == b"still here\n" and final["status"] == "completed", (streams, final)
    print("after 2038: connected, and a task has run")
    device.wait_for("the clock is set back", PATIENCE_SECONDS)
    bench.gateway.output(bench.gateway.submit("true"))
    latest = [line for _, line in device.lines if ": completed after" in line][-1]
    assert latest.startswith("20") and int(latest[:4]) < 2038, latest
    print("the server tells the present again: the clock is set back")


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--away", type=float, nargs="+", default=[3, 12, 60], help="seconds without link")
    given = parser.parse_args()
    with Bench(given, tls=True) as bench:
        cable = Cable()
        check_clock(boot(bench, cable))
        check_loss(bench, cable)
        took = [check_link(bench, away) for away in given.away]
        check_far_ahead(bench, cable)
    return 0 if max(took) <= RETURN_SECONDS_MAX else 1


if __name__ == "__main__":
    sys.exit(main())
