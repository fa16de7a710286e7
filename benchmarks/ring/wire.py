"""`python -m benchmarks.ring.wire PORTS`: a switch, and a link to each of its ports with a rate and a latency.

For a kernel without `netem`. Ports are TAP devices that the caller has opened. A frame that a machine has sent is read,
has its time on the link of the sender and on that of the receiver, and is written to the receiver's port when its last
bit would be there:

```
sender's link    |--- frame ---|
receiver's link     |--- frame ---|            begins with the first bit, as packets of 1,500 bytes would
latency                           |----->| written
```

TCP's segments come and go in frames of up to 64 KiB, as network cards take them (TSO): the time on a link is that of
the packets that a card would make of them, with their headers. A frame that would wait for over 100 ms is dropped.

Standard input takes changes of links as lines of JSON, and its end is the end of the process.
"""

from __future__ import annotations

import heapq
import json
import os
import select
import struct
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count

__all__ = ["HEADER_BYTES", "Link", "Switch", "wire_bytes"]

HEADER_BYTES = 10
"""virtio_net_hdr, which comes before each frame: flags, GSO type, bytes of headers, of a segment, checksum's place."""
_HEADER = struct.Struct("<BBHHHH")
_FRAMING_BYTES = 24
"""Preamble, checksum and gap of each packet on the wire."""
_LEAST_BYTES = 60
_FRAME_BYTES = HEADER_BYTES + 14 + (1 << 16)
_WAITS_S = 0.1
_AT_ONCE = 16
"""Frames that are read from a port before others have their turn."""
_PRIORITY = 10


@dataclass(slots=True, kw_only=True)
class Link:
    """A machine's link to the switch.

    Attributes:
        bits_per_s: in each direction; None without a bound.
        latency_s: of a frame that this machine sends.
        sends_until_s, takes_until_s: when the frames before have passed.
    """

    bits_per_s: int | None
    latency_s: float
    sends_until_s: float = 0.0
    takes_until_s: float = 0.0

    def seconds(self, nbytes: int) -> float:
        """The time that bytes take on it."""
        return 8 * nbytes / self.bits_per_s if self.bits_per_s else 0.0


def wire_bytes(frame: bytes) -> int:
    """Bytes of a frame on a wire, as the packets of which it is made, with their headers."""
    _, kind, header, size, _, _ = _HEADER.unpack_from(frame)
    nbytes = len(frame) - HEADER_BYTES
    packets = -(-(nbytes - header) // size) if kind and size else 1
    return max(nbytes, _LEAST_BYTES) + (packets - 1) * header + packets * _FRAMING_BYTES


class Switch:
    """Says when a frame is where. Pure.

    Args:
        links: of its ports.
    """

    def __init__(self, links: Sequence[Link]) -> None:
        self.links = links
        self._ports: dict[bytes, int] = {}

    def forward(self, frame: bytes, sender: int, now_s: float) -> list[tuple[float, int]]:
        """When a frame is at which ports.

        Args:
            frame: behind its virtio_net_hdr.
            sender: the port that has sent it.
            now_s: when it did.
        """
        to, came = frame[HEADER_BYTES : HEADER_BYTES + 6], frame[HEADER_BYTES + 6 : HEADER_BYTES + 12]
        self._ports[came] = sender
        known = self._ports.get(to)
        receivers = [known] if known is not None else [port for port in range(len(self.links)) if port != sender]
        nbytes, own = wire_bytes(frame), self.links[sender]
        begin_s = max(now_s, own.sends_until_s)
        if begin_s - now_s > _WAITS_S:
            return []
        own.sends_until_s = begin_s + own.seconds(nbytes)
        found = []
        for port in receivers:
            other = self.links[port]
            takes_s = max(begin_s, other.takes_until_s)
            if takes_s - begin_s > _WAITS_S:
                continue
            other.takes_until_s = max(takes_s + other.seconds(nbytes), own.sends_until_s)
            found.append((other.takes_until_s + own.latency_s, port))
        return found


def _carry(switch: Switch, ports: Sequence[int]) -> None:
    """Carry frames until standard input ends."""
    numbers, waiting = {port: number for number, port in enumerate(ports)}, list[tuple[float, int, int, bytes]]()
    order, changes = count(), sys.stdin.fileno()
    for port in ports:
        os.set_blocking(port, False)
    while True:
        now_s = time.monotonic()
        while waiting and waiting[0][0] <= now_s:
            _, _, number, frame = heapq.heappop(waiting)
            with suppress(OSError):  # the machine is there no more
                os.write(ports[number], frame)
        left_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for ready in select.select([*ports, changes], [], [], left_s)[0]:
            if ready == changes:
                if not (lines := os.read(changes, 1 << 16)):
                    return
                for line in lines.splitlines():
                    change = json.loads(line)
                    link = switch.links[change["port"]]
                    link.bits_per_s, link.latency_s = change["bits_per_s"], change["latency_s"]
                continue
            for _ in range(_AT_ONCE):
                try:
                    frame = os.read(ready, _FRAME_BYTES)
                except OSError:  # no other frame, or the machine is there no more
                    break
                for at_s, number in switch.forward(frame, numbers[ready], time.monotonic()):
                    heapq.heappush(waiting, (at_s, next(order), number, frame))


def main() -> None:
    # A wire does not wait for a processor.
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(_PRIORITY))
    given = json.loads(sys.argv[1])
    links = [Link(bits_per_s=one["bits_per_s"], latency_s=one["latency_s"]) for one in given]
    _carry(Switch(links), [one["port"] for one in given])


if __name__ == "__main__":
    main()
