"""The pipelines of all models of this process: a budget covers the whole process."""

from __future__ import annotations

import os
import threading
import weakref

from pipeload.pipeline.pipeline import Pipeline

__all__ = ["OPEN_PIPELINES"]


class _OpenPipelines:
    """Knows every pipeline that was not garbage-collected yet.

    Attributes:
        lock: a `load` holds it from measuring the process until its own pipeline is added: of two models that load at
            the same time, the second counts the first.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._pipelines: list[weakref.ref[Pipeline]] = []

    def add(self, pipeline: Pipeline) -> None:
        """Count this one from now on. The caller holds the lock."""
        self._pipelines = [known for known in self._pipelines if known() is not None]
        self._pipelines.append(weakref.ref(pipeline))

    def to_come_bytes(self) -> int:
        """Memory that these pipelines will occupy but do not occupy yet. The caller holds the lock."""
        found = [known() for known in self._pipelines]
        return sum(pipeline.to_come_bytes for pipeline in found if pipeline is not None)

    def forget(self) -> None:
        """Start anew in a forked child: it has no pipelines, and a thread of the parent may hold the lock."""
        self.lock = threading.Lock()
        self._pipelines = []


OPEN_PIPELINES = _OpenPipelines()
os.register_at_fork(after_in_child=OPEN_PIPELINES.forget)
