"""The emulated device: 64 MiB of memory, no clock, one data partition; and its console."""

import json
import os
import re
import socket
import subprocess
import threading
import time

MEMORY_MIB = 64


class Device:
    """One power-on. `image` is the folder that image.sh made; `disk` is a Disk. Without a Cable the
    network is perfect.
    """

    def __init__(self, image: str, disk, url: str, work: str, settings: dict[str, str] = {}, cable=None):
        self.started = time.monotonic()
        self.lines: list[tuple[float, str]] = []
        self._arrived = threading.Condition()
        self._qmp_path = os.path.join(work, "qmp")
        words = [f"hostlink.set.{key}={value}" for key, value in settings.items()]
        # The kernel's self-tests of its ciphers take two seconds under emulation.
        append = ["console=ttyAMA0", "quiet", "cryptomgr.notests", "panic=-1", f"hostlink.url={url}", *words]
        command = [
            "qemu-system-arm", "-M", "virt,highmem=off", "-m", str(MEMORY_MIB),
            "-nodefaults", "-display", "none", "-monitor", "none", "-serial", "stdio", "-no-reboot",
            # A device without a battery: every power-on is in 1970.
            "-rtc", "base=1970-01-01T00:00:00",
            "-kernel", os.path.join(image, "vmlinux.uimage"),
            "-initrd", os.path.join(image, "initramfs"),
            "-append", " ".join(append),
            "-drive", f"file={image}/root.ext4,format=raw,if=none,id=root,readonly=on",
            "-device", "virtio-blk-device,drive=root,serial=root",
            "-blockdev", "driver=nbd,node-name=data,server.type=unix,"
            f"server.path={disk.socket_path},cache.direct=on",
            "-device", "virtio-blk-device,drive=data,serial=data,write-cache=on",
            *(cable.arguments() if cable else ["-netdev", "user,id=net"]),
            "-device", "virtio-net-device,netdev=net,id=nic",
            "-qmp", f"unix:{self._qmp_path},server=on,wait=off",
        ]
        if os.path.exists(self._qmp_path):
            os.unlink(self._qmp_path)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._reader = threading.Thread(target=self._read_console, daemon=True)
        self._reader.start()

    def _read_console(self) -> None:
        for raw in self.process.stdout:
            line = raw.decode("utf-8", "replace").rstrip("\r\n")
            with self._arrived:
                self.lines.append((time.monotonic() - self.started, line))
                self._arrived.notify_all()
        with self._arrived:
            self._arrived.notify_all()

    def wait_for(self, pattern: str, seconds: float, after: int = 0) -> str:
        """The first console line from number `after` on that the pattern is found in."""
        deadline = time.monotonic() + seconds
        position = after
        with self._arrived:
            while True:
                while position < len(self.lines):
                    line = self.lines[position][1]
                    if re.search(pattern, line):
                        return line
                    position += 1
                left = deadline - time.monotonic()
                if left <= 0 or self.process.poll() is not None:
                    raise TimeoutError(f"no `{pattern}` on the console:\n{self.console()}")
                self._arrived.wait(min(left, 1.0))

    def console(self) -> str:
        return "\n".join(f"{at:7.2f} {line}" for at, line in self.lines[-60:])

    def set_link(self, up: bool) -> None:
        """Plugs or unplugs the network cable."""
        self.ask("set_link", name="nic", up=up)

    def ask(self, command: str, **arguments) -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(self._qmp_path)
            stream = connection.makefile("rw")
            stream.readline()
            for each in ({"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}):
                stream.write(json.dumps(each) + "\n")
                stream.flush()
                while True:
                    answer = json.loads(stream.readline())
                    if "error" in answer:
                        raise RuntimeError(f"{command}: {answer['error']}")
                    if "return" in answer:
                        break

    def cut(self) -> None:
        """Ends the emulator at once, wherever it is. What was on its console is read to the end."""
        self.process.kill()
        self.process.wait()
        self._reader.join(10)
