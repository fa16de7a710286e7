"""Bodies of `/v1/models`, `/health` and `/ready`."""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = ["Health", "ModelInfo", "ModelList"]


class ModelInfo(msgspec.Struct, kw_only=True):
    """A model.

    Attributes:
        task: what it was exported for.
        state: a closed model opens with its next call.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "pipeload"
    root: str
    task: str
    state: Literal["open", "closed"]


class ModelList(msgspec.Struct, kw_only=True):
    """All models, and their other names."""

    object: Literal["list"] = "list"
    data: list[ModelInfo]


class Health(msgspec.Struct, kw_only=True):
    """Whether the server answers calls."""

    status: Literal["ok", "loading", "busy"]
