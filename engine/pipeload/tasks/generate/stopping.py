"""Texts that end a generation."""

from __future__ import annotations

from collections.abc import Sequence

from pipeload.tasks.text.tokenizer import Detokenizer, Tokenizer

__all__ = ["StopStrings"]


class StopStrings:
    """Looks for stop strings in the text of one growing sequence, wherever they lie in its tokens.

    It searches the text with and without special tokens, so `<|im_end|>` can be a stop string. Only new text counts: a
    stop string that begins in the prompt does not.

    Args:
        texts: the stop strings, none of them empty.
        tokenizer: decodes.
        before: the tokens of the prompt.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer, before: Sequence[int]) -> None:
        self._readers = [_Reader(texts, Detokenizer(tokenizer, before, special=special)) for special in (False, True)]

    def push(self, id_: int) -> bool:
        """Whether the text contains a stop string, now that this token has come."""
        # Each search must see the token.
        found = [reader.push(id_) for reader in self._readers]
        return any(found)


class _Reader:
    def __init__(self, texts: Sequence[str], detokenizer: Detokenizer) -> None:
        self._texts = texts
        self._overlap = max(map(len, texts)) - 1
        self._detokenizer = detokenizer
        self._end = ""

    def push(self, id_: int) -> bool:
        text = self._end + self._detokenizer.push(id_)
        whole = text + self._detokenizer.held
        # Of text that was searched before, keep only the part in which a stop string may have begun.
        self._end = text[max(len(text) - self._overlap, 0) :]
        return any(stop in whole for stop in self._texts)
