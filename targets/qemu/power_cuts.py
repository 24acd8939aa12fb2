#!/usr/bin/env python3
"""Cuts the power of the emulated device again and again while tasks print, and checks the gateway.

    power_cuts.py CUTS [SEED]

The emulator is killed at random moments: while the device boots, registers, recovers, runs tasks, or
has been sending into a network that swallows everything; mostly just when it flushes its disk, so that
there is something to lose. The disk keeps a random part of what was not flushed (disk.py). Then the
device is switched on again. Checked is that

- the agent comes up by itself, with the same identity;
- every byte and final that it ever sent, and so every acknowledged one, is at the gateway at last,
  unchanged and without a hole, and what it sends again is the same;
- no attempt runs twice, and each one ends, as completed only with all of its output.

The same seed makes the same choices; the exact instants within the guest are not repeatable.
"""

import random
import sys
import time

import tasks
from bench import PATIENCE_SECONDS, Bench, arguments
from device import Device
from tap import Tap

SETTINGS = {
    "HOSTLINK_WS_RECONNECT_MIN": "100ms",
    "HOSTLINK_WS_RECONNECT_MAX": "1s",
    "HOSTLINK_REGISTRATION_RETRY_INITIAL_DELAY": "1s",
    "HOSTLINK_TASK_CONCURRENCY": "2",
}
# Tasks that may be under way before further ones are submitted.
OPEN_TASKS_MAX = 5
# Flushes until a cut, on average.
TASK_FLUSHES = 12
BOOT_FLUSHES = 4
# Cuts that come before the agent has registered for the first time.
FIRST_BOOT_CUTS = 3


class Failure(AssertionError):
    pass


class Campaign:
    def __init__(self, bench: Bench, seed: int):
        self.bench = bench
        self.gateway = bench.gateway
        self.seed = seed
        self.tap = Tap(self.gateway.port)
        self.open: list[tasks.Task] = []
        self.runs: dict[str, int] = {}
        self.checked = 0
        self.boot_seconds = 20.0

    def power_on(self) -> None:
        url = f"http://10.0.2.2:{self.tap.port}"
        self.bench.device = Device(self.bench.image, self.bench.disk, url, self.bench.work, SETTINGS)

    def connected(self) -> None:
        """Waits for the session that this power-on begins."""
        self.gateway.wait(
            lambda: self.tap.hellos and self.gateway.connected(), "the agent comes up by itself", PATIENCE_SECONDS
        )
        self.boot_seconds = time.monotonic() - self.bench.device.started

    def power_off(self, chance: random.Random) -> str:
        device = self.bench.device
        device.cut()
        kept = self.bench.disk.cut(chance)
        self.bench.device = None
        for _, line in device.lines:
            if line.startswith("RUN "):
                name = line.split()[1]
                self.runs[name] = self.runs.get(name, 0) + 1
                if self.runs[name] > 1:
                    raise Failure(f"task {name} ran {self.runs[name]} times")
        self.tap.release()
        # The old session is over before the next power-on, so that it is not taken for the new one.
        self.gateway.wait(lambda: not self.gateway.connected(), "the gateway sees the end", 60)
        return kept

    def submit(self, name: str, chance: random.Random) -> None:
        task = tasks.make(name, chance)
        task.task_id = self.gateway.submit(task.command)
        task.attempt = self.gateway.task(task.task_id)["execution_attempt_id"]
        self.open.append(task)

    def check(self) -> None:
        if self.tap.wrong:
            raise Failure("; ".join(self.tap.wrong[:5]))
        agents = self.gateway.agents()
        if len(agents) > 1:
            raise Failure(f"the device has registered under {len(agents)} identities")
        for agent in agents:
            if agent["counters"]["changed_repeats"]:
                raise Failure(f"the gateway counts changed repeats: {agent['counters']}")
        for task in [each for each in self.open if self.gateway.task(each.task_id)["result"]]:
            self.check_ended(task)
            self.open.remove(task)
            self.checked += 1

    def check_ended(self, task: tasks.Task) -> None:
        sent = {
            stream: max(self.tap.chunks.get((task.attempt, stream), {0: b""}))
            for stream in ("stdout", "stderr")
        }

        def all_there():
            info = self.gateway.task(task.task_id)
            return all(info[each]["highest_sequence"] >= highest for each, highest in sent.items())

        # A final may come by report, before the output that waits (PROTOCOL.md 4.7).
        self.gateway.wait(all_there, f"all that was sent of task {task.name} is at the gateway", 60)
        info = self.gateway.task(task.task_id)
        streams, final = self.gateway.output(task.task_id)
        for stream, expected in (("stdout", task.stdout), ("stderr", task.stderr)):
            got = streams[stream]
            if info[stream]["truncated_jumps"] or not expected.startswith(got):
                raise Failure(f"task {task.name}: {stream} lost or changed, {len(got)} bytes came")
            chunks = self.tap.chunks.get((task.attempt, stream), {})
            noted = b"".join(chunks[sequence] for sequence in sorted(chunks))
            if sorted(chunks) != list(range(1, len(chunks) + 1)) or not got.startswith(noted):
                raise Failure(f"task {task.name}: {stream} at the gateway is not what was sent")
        whole = streams["stdout"] == task.stdout and streams["stderr"] == task.stderr
        # A report has no such status (PROTOCOL.md 2).
        error = final["error"] or ""
        status = "interrupted" if error.startswith("interrupted") else final["status"]
        if status not in ("interrupted", task.status):
            raise Failure(f"task {task.name} ended {final}")
        if status == task.status and not (whole and self.runs_now(task.name) == 1):
            raise Failure(f"task {task.name} ended {status} without all of its output")
        noted_final = self.tap.finals.get(task.attempt)
        if noted_final and noted_final[1] != status:
            raise Failure(f"task {task.name}: sent {noted_final}, at the gateway {status}")

    def runs_now(self, name: str) -> int:
        lines = self.bench.device.lines if self.bench.device else []
        return self.runs.get(name, 0) + sum(line == f"RUN {name}" for _, line in list(lines))

    def drain(self, left: int) -> None:
        def drained():
            self.check()
            return len(self.open) <= left

        self.gateway.wait(drained, f"tasks end: {[each.name for each in self.open]}", PATIENCE_SECONDS)

    def cycle(self, number: int) -> str:
        chance = random.Random(f"{self.seed}/{number}")
        self.power_on()
        if number <= FIRST_BOOT_CUTS or chance.random() < 0.15:
            told = self.wait_for_cut(chance, chance.uniform(0.2, 1.2) * self.boot_seconds, BOOT_FLUSHES)
            return f"during the start, {told}; {self.power_off(chance)}"
        self.connected()
        self.check()
        if len(self.open) > OPEN_TASKS_MAX:
            self.drain(OPEN_TASKS_MAX // 2)
        for each in range(chance.randint(1, 3)):
            self.submit(f"t{number}-{each}", chance)
        told = f"up after {self.boot_seconds:.1f} s, "
        if chance.random() < 0.4:
            moment = min(chance.expovariate(1.0), 5.0)
            time.sleep(moment)
            self.tap.hold()
            told += f"silence {moment:.2f} s later, "
        told += self.wait_for_cut(chance, min(chance.expovariate(0.7), 5.0), TASK_FLUSHES)
        return f"{told}; {self.power_off(chance)}"

    def wait_for_cut(self, chance: random.Random, seconds: float, flushes: int) -> str:
        """Until then, or until one of the next flushes, `flushes` on average."""
        number = 0 if chance.random() < 0.15 else 1 + int(chance.expovariate(1 / flushes))
        self.bench.disk.fail_at_flush(number)
        # A guest that flushes no more is cut nevertheless.
        if self.bench.disk.failed.wait(seconds if not number else 5.0 + self.boot_seconds):
            return f"cut at flush {number}"
        return f"cut before flush {number}" if number else f"cut {seconds:.2f} s later"

    def finish(self) -> None:
        self.power_on()
        self.connected()
        self.drain(0)
        self.power_off(random.Random(0))


def main() -> int:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("cuts", type=int)
    parser.add_argument("seed", type=int, nargs="?", default=1)
    given = parser.parse_args()
    begun = time.monotonic()
    with Bench(given) as bench:
        campaign = Campaign(bench, given.seed)
        number = 0
        try:
            for number in range(1, given.cuts + 1):
                print(f"{number:4} {campaign.cycle(number)}", flush=True)
            campaign.finish()
        except (Failure, TimeoutError) as failure:
            print(f"FAILED at cut {number} of seed {given.seed}: {failure}", flush=True)
            if bench.device is not None:
                print(bench.device.console())
            return 1
        tap = campaign.tap
        print(
            f"{given.cuts} power cuts with seed {given.seed} in {time.monotonic() - begun:.0f} s:"
            f" {campaign.checked} tasks ended, {tap.frames} messages noted, {tap.repeated} repeated and the"
            f" same, {bench.disk.flushes} flushes; {bench.disk.cuts_met_volatile} cuts met unflushed"
            f" sectors, {bench.disk.lost_sectors} of them were lost"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
