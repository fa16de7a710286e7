"""Bodies of `/v1/embeddings`, and of `/embed` as text-embeddings-inference (TEI) has it."""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = ["EmbedRequest", "Embedding", "EmbeddingsAnswer", "EmbeddingsRequest", "InputUsage"]


class EmbeddingsRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Texts to embed.

    Attributes:
        input: a text, its token ids, or a list of either.
        model: a name of `/v1/models`; may be left out where one model embeds texts.
        encoding_format: numbers, or the bytes of little-endian float32 as base64.
        dimensions: keep this many of the first numbers of each vector, brought to length 1.
        user: has no effect.
    """

    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None


class InputUsage(msgspec.Struct, kw_only=True):
    """Counts of tokens."""

    prompt_tokens: int
    total_tokens: int


class Embedding(msgspec.Struct, kw_only=True):
    """The vector of a text."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsAnswer(msgspec.Struct, kw_only=True):
    """All vectors."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: InputUsage


class EmbedRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Texts to embed, as TEI takes them.

    Attributes:
        inputs: a text or several.
        normalize: bring each vector to length 1.
        truncate: cut texts that are longer than the model takes; otherwise they are refused.
        truncation_direction: only the end of a text is cut.
        prompt_name: of a prompt of the model that goes before each text.
        dimensions: keep this many of the first numbers of each vector.
    """

    inputs: str | list[str]
    normalize: bool = True
    truncate: bool | None = None
    truncation_direction: str | None = None
    prompt_name: str | None = None
    dimensions: int | None = None
