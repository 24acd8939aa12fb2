#!/usr/bin/env python3
"""Runs behaviour tests on an emulated machine whose kernel has every cgroup controller.

    with_cgroups.py [TEST FILTER …]

Tests of cgroups say SKIPPED on a machine without them, or with those of version 1. Here none may.
The root file system is the host's own, read-only over 9p, so the tests and the agent are those that
cargo has built for the host; what they write goes to memory. Without arguments: `task_cgroups` and
`task_limits`.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
TARGET = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))
MODULES = ["virtio_pci", "9p", "9pnet_virtio"]
MEMORY_MIB = 1024
CPUS = 2


def test_binary() -> str:
    """Builds the behaviour tests, and with them the agent."""
    command = ["cargo", "test", "--no-run", "--test", "behaviour"]
    said = subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.PIPE, text=True).stderr
    found = re.search(r"Executable tests/behaviour/main.rs \((\S+)\)", said)
    if not found:
        sys.exit(f"cargo does not name the tests:\n{said}")
    return os.path.join(ROOT, found[1])


def initramfs(kernel: str, work: str, script: str) -> str:
    root = os.path.join(work, "initramfs")
    for name in ("bin", "dev", "proc", "root"):
        os.makedirs(os.path.join(root, name))
    shutil.copy("/usr/bin/busybox", os.path.join(root, "bin/busybox"))
    shutil.copytree(os.path.join(kernel, "modules"), os.path.join(root, "modules"))
    shutil.copy(os.path.join(HERE, "files/tests_init"), os.path.join(root, "init"))
    with open(os.path.join(root, "tests"), "w") as file:
        file.write(script)
    os.chmod(os.path.join(root, "init"), 0o755)
    packed = os.path.join(work, "initramfs.cpio")
    command = f"cd {shlex.quote(root)} && find . | cpio --quiet -o -H newc -R 0:0 >{shlex.quote(packed)}"
    subprocess.run(["sh", "-c", command], check=True)
    return packed


def run(kernel: str, packed: str, seconds: float) -> str:
    command = [
        "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", str(CPUS), "-m", str(MEMORY_MIB),
        "-nodefaults", "-display", "none", "-monitor", "none", "-serial", "stdio", "-no-reboot",
        "-kernel", os.path.join(kernel, "vmlinuz"), "-initrd", packed,
        "-append", "console=ttyS0 quiet cryptomgr.notests panic=-1 mitigations=off tsc=reliable",
        "-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap",
    ]
    said = []
    began = time.monotonic()
    machine = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        os.set_blocking(machine.stdout.fileno(), False)
        while machine.poll() is None and time.monotonic() - began < seconds:
            data = machine.stdout.read()
            if data:
                text = data.decode("utf-8", "replace")
                said.append(text)
                print(text, end="", flush=True)
            else:
                time.sleep(0.05)
        rest = machine.stdout.read()
        if rest:
            said.append(rest.decode("utf-8", "replace"))
            print(said[-1], end="", flush=True)
        if machine.poll() is None:
            print(f"the machine has not ended after {seconds:.0f} s")
    finally:
        machine.kill()
        machine.wait()
    return "".join(said)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("filters", nargs="*", default=["task_cgroups", "task_limits"])
    parser.add_argument("--tests", help="the behaviour tests (default: cargo makes them)")
    parser.add_argument("--seconds", type=float, default=900)
    given = parser.parse_args()
    if os.uname().machine != "x86_64":
        sys.exit("with_cgroups.py: the emulated machine is an x86_64 one, and this is not")
    kernel = os.path.join(TARGET, "kernel")
    subprocess.run([os.path.join(HERE, "fetch_kernel.sh"), kernel, *MODULES], check=True)
    words = [given.tests or test_binary(), "--nocapture", "--test-threads=1", *given.filters]
    environment = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/ TMPDIR=/run/tmp"
    # The processors are emulated, and a test ends only with them what has filled them for seconds.
    settings = {"HOSTLINK_TEST_PATIENCE": "4", **os.environ}
    for name, value in settings.items():
        if name.startswith("HOSTLINK_TEST_"):
            environment += f" {name}={shlex.quote(value)}"
    script = f"{environment} {shlex.join(words)}\necho \"ENDED $?\"\nbusybox poweroff -f\n"
    with tempfile.TemporaryDirectory(prefix="hostlink-cgroups-") as work:
        said = run(kernel, initramfs(kernel, work, script), given.seconds)
    passed = re.search(r"test result: ok\. (\d+) passed", said)
    if "ENDED 0" not in said or not passed or int(passed[1]) == 0:
        print("FAILED")
        return 1
    if "SKIPPED" in said:
        print("FAILED: this machine has everything, and still tests were skipped")
        return 1
    print(f"{passed[1]} tests passed on a kernel with cgroups of version 2")
    return 0


if __name__ == "__main__":
    sys.exit(main())
