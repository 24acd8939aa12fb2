"""The network cable of the emulated device, with loss and delay.

Ethernet frames travel as UDP datagrams from the emulator's card to this and on to its network, and
back. Each is lost by chance or passed on after its delay, in order.
"""

import heapq
import random
import select
import socket
import threading
import time

FRAME_BYTES_MAX = 65536


class Cable:
    """Perfect until `set` says otherwise."""

    def __init__(self):
        self.lost = 0
        self.passed = 0
        self._loss = 0.0
        self._delay_seconds = 0.0
        self._chance = random.Random(1)
        # One socket towards the card, one towards the network, and the ports of their other ends.
        self._sockets = [_bound(), _bound()]
        self._ends = [_free_port(), _free_port()]
        threading.Thread(target=self._pass_frames, daemon=True).start()

    def set(self, loss: float, delay_seconds: float) -> None:
        """`loss` of all frames, 0 to 1, in each direction; the delay is that of one direction."""
        self._loss, self._delay_seconds = loss, delay_seconds

    def arguments(self) -> list[str]:
        """For the emulator: the card's network is `net`."""
        card, network = [
            f"127.0.0.1:{each.getsockname()[1]},localaddr=127.0.0.1:{end}"
            for each, end in zip(self._sockets, self._ends)
        ]
        return [
            "-netdev", f"socket,id=net,udp={card}",
            "-netdev", "user,id=outside", "-netdev", "hubport,id=hub0,hubid=0,netdev=outside",
            "-netdev", f"socket,id=far,udp={network}", "-netdev", "hubport,id=hub1,hubid=0,netdev=far",
        ]

    def _pass_frames(self) -> None:
        waiting: list[tuple[float, int, int, bytes]] = []  # due, number, direction, frame
        number = 0
        while True:
            timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
            readable, _, _ = select.select(self._sockets, [], [], timeout)
            for each in readable:
                frame = each.recv(FRAME_BYTES_MAX)
                if self._chance.random() < self._loss:
                    self.lost += 1
                    continue
                number += 1
                direction = 1 - self._sockets.index(each)
                heapq.heappush(waiting, (time.monotonic() + self._delay_seconds, number, direction, frame))
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, direction, frame = heapq.heappop(waiting)
                try:
                    self._sockets[direction].sendto(frame, ("127.0.0.1", self._ends[direction]))
                    self.passed += 1
                except OSError:
                    pass  # The emulator is off.


def _bound() -> socket.socket:
    each = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    each.bind(("127.0.0.1", 0))
    return each


def _free_port() -> int:
    with _bound() as each:
        return each.getsockname()[1]
