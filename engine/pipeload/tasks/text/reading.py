"""Memory that the tokenizers library takes while it reads a text: hundreds of bytes for each of its characters.

```
a text of up to 1,600 ASCII characters, or 256 others    below FREE_BYTES; not looked at
any other                                                by its tokens, counted in pieces, and its UTF-8 bytes
```
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["FREE_BYTES", "reading_bytes"]

FREE_BYTES = 1_000_000
"""Less than this needs no room of its own: one text is read at a time."""
_TOKEN_BYTES, _BYTE_BYTES = 700, 180
"""Of a token, and of a byte of the text. Measured over texts of 20 KB to 1 MB: at most 800 for a byte that is
a token (WordPiece), and 160 for a byte of a row of spaces (BPE); see tests/engine/tasks/text/test_reading.py."""
_PIECE = 256
"""Characters; Unicode's own longest expansion makes 18 of one, whose tokens still take little."""
_SHORT = FREE_BYTES // (_TOKEN_BYTES + _BYTE_BYTES)


def reading_bytes(text: str, tokens: Callable[[str], int]) -> int:
    """The most memory that the library takes for a text beyond what it takes for a short one, in bytes.

    Args:
        text: the text.
        tokens: counts those of a piece. A text has hardly more tokens than its pieces together.
    """
    if len(text) <= (_SHORT if text.isascii() else _PIECE):
        return 0
    pieces = (text[begin : begin + _PIECE] for begin in range(0, len(text), _PIECE))
    return sum(_TOKEN_BYTES * tokens(piece) + _BYTE_BYTES * len(piece.encode()) for piece in pieces)
