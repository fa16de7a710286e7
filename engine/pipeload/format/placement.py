"""Where the weights of a shard lie in the buffer that it is loaded into. Pure.

Bytes are used where they were read, unless the shard has tensors that are widened. Then its streamed range is read to
the end of a buffer that is large enough for the widened tensors, and they move to the front, one after another:

```
read        |                              | w1 (16 bits) | b1 | w2 (16 bits) |
widened     | w1 (32 bits)       | b1 | w2 (32 bits)                  |
```

No byte is overwritten before it was used: from any tensor on, the widened ones take at least as many bytes as the
stored ones, and the buffer has room for what pages add. Widened tensors of kept parts go into the buffer last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeload.format.manifest import PAGE_BYTES, Shard
from pipeload.format.pages import memory_ceil, page_ceil, page_floor, room_bytes

__all__ = ["AS_READ", "Placement", "place"]

_ALIGNED_BYTES = 64


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the weights of one shard lie while a range of them is streamed.

    Attributes:
        nbytes: size of the buffer.
        read_at: place in the buffer of the page in which the streamed range begins.
        places: name of a tensor that moves -> its first byte in the buffer; in the order in which they lie in the file.
    """

    nbytes: int
    read_at: int = 0
    places: Mapping[str, int] = field(default_factory=dict)


AS_READ = Placement(0)
"""Of a buffer that begins with the page in which a range begins, and whose bytes are used where they are read."""


def place(shard: Shard, streamed: tuple[int, int]) -> Placement:
    """Where the weights lie.

    Args:
        shard: the shard.
        streamed: the range that is read into the buffer, first byte and end, counted from the beginning of the shard's
            weights; the tensors outside of it are kept elsewhere as they are stored.
    """
    begin, end = streamed
    if not shard.widens:
        return Placement(room_bytes(begin, end))
    assert shard.weights is not None
    places: dict[str, int] = {}
    at = 0
    for spec in sorted(shard.tensors, key=lambda spec: spec.offset):
        if spec.widened is not None or begin <= spec.offset - shard.weights.offset < end:
            places[spec.name] = at
            at += -(-spec.memory_bytes // _ALIGNED_BYTES) * _ALIGNED_BYTES
    nbytes = memory_ceil(at + 2 * PAGE_BYTES)
    return Placement(nbytes, nbytes - (page_ceil(end) - page_floor(begin)), places)
