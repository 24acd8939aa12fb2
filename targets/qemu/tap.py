"""A proxy between device and gateway that reads along and can fall silent.

It notes every output chunk and final that the device sends: what is sent is durable on the device
(PROTOCOL.md 4.1), so all of it must be there again after a power cut, and the same. While it holds,
it still reads and notes what the device sends, and passes nothing on in either direction.
"""

import base64
import json
import socket
import struct
import threading


class Changed(AssertionError):
    pass


class Tap:
    def __init__(self, gateway_port: int):
        self._gateway_port = gateway_port
        self._lock = threading.Lock()
        self._generation = 0
        self._holding = False
        self._sockets: list[socket.socket] = []
        # (attempt, stream) → sequence → bytes; attempt → final; and what was wrong.
        self.chunks: dict[tuple[str, str], dict[int, bytes]] = {}
        self.finals: dict[str, tuple] = {}
        self.wrong: list[str] = []
        # Since the last power-on.
        self.hellos = 0
        self.frames = 0
        self.repeated = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def hold(self) -> None:
        self._holding = True

    def release(self) -> None:
        """For the next power-on: what was held back is gone, and so are its connections."""
        with self._lock:
            self._generation += 1
            self._holding = False
            self.hellos = 0
            for each in self._sockets:
                try:
                    each.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
            self._sockets.clear()

    def _accept(self) -> None:
        while True:
            device, _ = self._listener.accept()
            try:
                gateway = socket.create_connection(("127.0.0.1", self._gateway_port))
            except OSError:
                device.close()
                continue
            with self._lock:
                generation = self._generation
                self._sockets += [device, gateway]
            threading.Thread(target=self._down, args=(gateway, device), daemon=True).start()
            threading.Thread(target=self._up, args=(device, gateway, generation), daemon=True).start()

    def _down(self, gateway: socket.socket, device: socket.socket) -> None:
        try:
            while data := gateway.recv(65536):
                if not self._holding:
                    device.sendall(data)
        except OSError:
            pass
        if not self._holding:
            _shut(device)

    def _up(self, device: socket.socket, gateway: socket.socket, generation: int) -> None:
        reader = _FrameReader()
        try:
            while data := device.recv(65536):
                # Noted before it is passed on, so that nothing is acknowledged that is not noted.
                for message in reader.feed(data):
                    with self._lock:
                        if generation == self._generation:
                            self._note(message)
                if not self._holding:
                    gateway.sendall(data)
        except OSError:
            pass
        _shut(gateway)

    def _note(self, message: dict) -> None:
        self.frames += 1
        attempt = message.get("execution_attempt_id", "")
        payload = message.get("payload", {})
        if message["type"] == "task.output":
            data = payload["data"]
            raw = base64.b64decode(data) if payload.get("encoding") else data.encode()
            if payload.get("truncated_locally"):
                self.wrong.append(f"attempt {attempt}: output is marked truncated")
            held = self.chunks.setdefault((attempt, payload["stream"]), {})
            before = held.setdefault(message["sequence"], raw)
            if before is not raw:
                self.repeated += 1
                if before != raw:
                    self.wrong.append(
                        f"attempt {attempt} {payload['stream']} {message['sequence']} came again"
                        f" changed: {before[:60]!r} … and {raw[:60]!r} …"
                    )
        elif message["type"] == "agent.hello":
            self.hellos += 1
        elif message["type"] == "task.final":
            final = (message["message_id"], payload["status"], payload["exit_code"])
            before = self.finals.setdefault(attempt, final)
            if before != final:
                self.wrong.append(f"attempt {attempt}: final {before} became {final}")


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


class _FrameReader:
    """JSON messages in what a WebSocket client sends; nothing for connections that are not."""

    def __init__(self):
        self._buffer = bytearray()
        self._upgraded = None

    def feed(self, data: bytes) -> list[dict]:
        if self._upgraded is False:
            return []
        self._buffer += data
        if self._upgraded is None:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return []
            self._upgraded = b"upgrade: websocket" in bytes(self._buffer[:end]).lower()
            del self._buffer[: end + 4]
            if not self._upgraded:
                self._buffer.clear()
                return []
        messages = []
        while (frame := self._frame()) is not None:
            opcode, payload = frame
            if opcode == 1:
                messages.append(json.loads(payload))
        return messages

    def _frame(self) -> tuple[int, bytes] | None:
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        length, start = buffer[1] & 0x7F, 2
        if length == 126:
            if len(buffer) < 4:
                return None
            (length,), start = struct.unpack_from(">H", buffer, 2), 4
        elif length == 127:
            if len(buffer) < 10:
                return None
            (length,), start = struct.unpack_from(">Q", buffer, 2), 10
        if len(buffer) < start + 4 + length:
            return None
        mask = bytes(buffer[start : start + 4])
        masked = bytes(buffer[start + 4 : start + 4 + length])
        opcode = buffer[0] & 0x0F
        del buffer[: start + 4 + length]
        # XOR of whole numbers: byte by byte this would be the slowest part of a campaign.
        pad = (mask * (length // 4 + 1))[:length]
        value = int.from_bytes(masked, "big") ^ int.from_bytes(pad, "big")
        return opcode, value.to_bytes(length, "big")
