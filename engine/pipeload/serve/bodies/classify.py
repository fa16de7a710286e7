"""Bodies of `/v1/classify`."""

from __future__ import annotations

from typing import Literal

import msgspec

from pipeload.serve.bodies.embeddings import InputUsage

__all__ = ["ClassifyAnswer", "ClassifyRequest", "Found", "FoundLabel", "Item"]


class Item(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A text, a pair of texts, or an image, as base64 or a `data:` URL."""

    text: str | None = None
    text_pair: str | None = None
    image: str | None = None


class ClassifyRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Texts, pairs or images to classify.

    Attributes:
        input: one or several.
        model: a name of `/v1/models`; may be left out where one model classifies.
        top_k: the most labels for each input; null for all. A token classifier gives all entities.
        aggregation_strategy: how a token classifier's tokens become entities.
    """

    input: str | Item | list[str | Item]
    model: str | None = None
    top_k: int | None = 5
    aggregation_strategy: Literal["none", "simple", "first", "average", "max"] = "simple"


class FoundLabel(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A label; of an entity, also its words and where they are: the first character and one past the last."""

    label: str
    score: float
    word: str | None = None
    start: int | None = None
    end: int | None = None


class Found(msgspec.Struct, kw_only=True):
    """The labels of an input, best first, or its entities in their order."""

    index: int
    labels: list[FoundLabel]


class ClassifyAnswer(msgspec.Struct, kw_only=True):
    """The labels of all inputs."""

    object: Literal["list"] = "list"
    data: list[Found]
    model: str
    usage: InputUsage | None = None
