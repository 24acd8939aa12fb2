"""A disk with a volatile write cache, served to the emulator over NBD.

What is written stays volatile until the guest flushes. A power cut keeps a random part of what was
volatile, block by block of the file system: nothing, all, what came first, or any subset. So a write
that nobody flushed may be lost, cut between two blocks, or overtaken by a later one, as on a real disk
or eMMC. Sectors torn within a block are the matter of the outbox's own tests, on its simulated disk.

A guest that flushes what it writes at once leaves little volatile at any moment that a clock picks. So
the disk itself can be told when the power goes: at a flush, before anything of it has happened.
"""

import os
import random
import socket
import struct
import threading

SECTOR_BYTES = 512
# A block of the file system (bench.py makes it with 1 KiB) gets to the medium as a whole: ext4 takes
# half of its superblock, or of the end of a transaction, for damage and does not mount, whatever an
# agent does.
_BLOCK_SECTORS = 2

_MAGIC = 0x4E42444D41474943
_OPTION_MAGIC = 0x49484156454F5054
_OPTION_REPLY_MAGIC = 0x3E889045565A9
_REQUEST_MAGIC = 0x25609513
_REPLY_MAGIC = 0x67446698
_OPTION_EXPORT_NAME, _OPTION_ABORT, _OPTION_INFO, _OPTION_GO = 1, 2, 6, 7
_REPLY_ACK, _REPLY_INFO, _REPLY_UNSUPPORTED = 1, 3, 0x80000001
_READ, _WRITE, _DISCONNECT, _FLUSH = 0, 1, 2, 3
_FORCE_UNIT_ACCESS = 1
# Has flags, sends flushes, sends force-unit-access writes.
_EXPORT_FLAGS = 1 | 4 | 8


class PowerGone(Exception):
    pass


def _swallow(stream) -> None:
    """Until the emulator is killed: a closed connection would be an I/O error to its guest."""
    try:
        while stream.read(SECTOR_BYTES):
            pass
    except OSError:
        pass


class Disk:
    """`content` survives cuts. Flushes that had something to do, cuts that met something volatile and
    the sectors lost by them are counted for the report."""

    def __init__(self, content: bytes, socket_path: str):
        self.durable = bytearray(content)
        self.volatile: dict[int, bytes] = {}  # sector → newest bytes, in order of their last write
        self.flushes = 0
        self.written_bytes = 0
        self.lost_sectors = 0
        self.cuts_met_volatile = 0
        # The power has gone at the flush that `fail_at_flush` has named.
        self.failed = threading.Event()
        self._flushes_until_failure = 0
        self.socket_path = socket_path
        self._lock = threading.Lock()
        # A request of an emulator that is dead must not reach the disk after its cut.
        self._epoch = 0
        if os.path.exists(socket_path):
            os.unlink(socket_path)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(socket_path)
        self._listener.listen(4)
        threading.Thread(target=self._accept, daemon=True).start()

    def fail_at_flush(self, number: int) -> None:
        """The power goes when the guest flushes something for the `number`th time from now on."""
        with self._lock:
            self._flushes_until_failure = number

    def cut(self, chance: random.Random) -> str:
        """The power is gone: settles what of the volatile sectors got to the medium."""
        with self._lock:
            self._epoch += 1
            self._flushes_until_failure = 0
            self.failed.clear()
            blocks: dict[int, list[tuple[int, bytes]]] = {}
            for sector, data in self.volatile.items():
                blocks.setdefault(sector // _BLOCK_SECTORS, []).append((sector, data))
            written = list(blocks.values())
            manner = chance.choice(["none", "none", "first", "any", "any", "most", "all"])
            if manner == "none":
                kept = []
            elif manner == "all":
                kept = written
            elif manner == "first":
                kept = written[: chance.randint(0, len(written))]
            else:
                share = 0.9 if manner == "most" else chance.random()
                kept = [block for block in written if chance.random() < share]
            kept = [each for block in kept for each in block]
            sectors = len(self.volatile)
            for sector, data in kept:
                start = sector * SECTOR_BYTES
                self.durable[start : start + SECTOR_BYTES] = data
            self.lost_sectors += sectors - len(kept)
            self.cuts_met_volatile += bool(sectors)
            self.volatile.clear()
            return f"{manner}: {len(kept)} of {sectors} unflushed sectors kept"

    def _read(self, offset: int, length: int) -> bytes:
        with self._lock:
            data = bytearray(self.durable[offset : offset + length])
            if self.volatile:
                for sector in range(offset // SECTOR_BYTES, (offset + length) // SECTOR_BYTES):
                    newest = self.volatile.get(sector)
                    if newest is not None:
                        start = sector * SECTOR_BYTES - offset
                        data[start : start + SECTOR_BYTES] = newest
            return bytes(data)

    def _write(self, epoch: int, offset: int, data: bytes, force: bool) -> None:
        assert offset % SECTOR_BYTES == 0 and len(data) % SECTOR_BYTES == 0, (offset, len(data))
        with self._lock:
            if epoch != self._epoch:
                raise PowerGone
            self.written_bytes += len(data)
            if force:
                self.durable[offset : offset + len(data)] = data
            for start in range(0, len(data), SECTOR_BYTES):
                sector = (offset + start) // SECTOR_BYTES
                self.volatile.pop(sector, None)
                if not force:
                    self.volatile[sector] = data[start : start + SECTOR_BYTES]

    def _flush(self, epoch: int) -> None:
        with self._lock:
            if epoch != self._epoch:
                raise PowerGone
            if not self.volatile:
                return
            if self._flushes_until_failure:
                self._flushes_until_failure -= 1
                if not self._flushes_until_failure:
                    # Nothing reaches the medium any more, and nobody gets an answer.
                    self._epoch += 1
                    self.failed.set()
                    raise PowerGone
            for sector, data in self.volatile.items():
                start = sector * SECTOR_BYTES
                self.durable[start : start + SECTOR_BYTES] = data
            self.volatile.clear()
            self.flushes += 1

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with self._lock:
            epoch = self._epoch
        stream = connection.makefile("rb")

        def take(length: int) -> bytes:
            data = stream.read(length)
            if len(data) < length:
                raise EOFError
            return data

        try:
            if self._negotiate(connection, take):
                self._transmit(connection, take, epoch)
        except PowerGone:
            _swallow(stream)
        except (EOFError, OSError):
            pass  # The emulator was killed.
        finally:
            stream.close()
            connection.close()

    def _negotiate(self, connection: socket.socket, take) -> bool:
        # Fixed newstyle, without the zeroes that old clients wait for.
        connection.sendall(struct.pack(">QQH", _MAGIC, _OPTION_MAGIC, 1 | 2))
        (client_flags,) = struct.unpack(">I", take(4))
        size = len(self.durable)
        while True:
            _, option, length = struct.unpack(">QII", take(16))
            take(length)

            def reply(kind: int, data: bytes = b"") -> None:
                head = struct.pack(">QIII", _OPTION_REPLY_MAGIC, option, kind, len(data))
                connection.sendall(head + data)

            if option == _OPTION_EXPORT_NAME:
                zeroes = b"" if client_flags & 2 else bytes(124)
                connection.sendall(struct.pack(">QH", size, _EXPORT_FLAGS) + zeroes)
                return True
            if option in (_OPTION_GO, _OPTION_INFO):
                reply(_REPLY_INFO, struct.pack(">HQH", 0, size, _EXPORT_FLAGS))
                reply(_REPLY_ACK)
                if option == _OPTION_GO:
                    return True
            elif option == _OPTION_ABORT:
                reply(_REPLY_ACK)
                return False
            else:
                reply(_REPLY_UNSUPPORTED)

    def _transmit(self, connection: socket.socket, take, epoch: int) -> None:
        while True:
            _, flags, kind, cookie, offset, length = struct.unpack(">IHHQQI", take(28))
            answer = b""
            if kind == _READ:
                answer = self._read(offset, length)
            elif kind == _WRITE:
                self._write(epoch, offset, take(length), bool(flags & _FORCE_UNIT_ACCESS))
            elif kind == _FLUSH:
                self._flush(epoch)
            elif kind == _DISCONNECT:
                return
            connection.sendall(struct.pack(">IIQ", _REPLY_MAGIC, 0, cookie) + answer)
