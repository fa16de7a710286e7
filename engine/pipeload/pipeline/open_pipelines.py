"""The pipelines of all models of this process: a budget is the whole process's."""

from __future__ import annotations

import os
import threading
import weakref

from pipeload.pipeline.pipeline import Pipeline

__all__ = ["OPEN_PIPELINES"]


class _OpenPipelines:
    """Knows every pipeline that was not collected yet.

    Attributes:
        lock: a loader of a model holds it from the moment when it measures the process until its own pipeline is added:
            of two models that are loaded at the same time, the second one counts the first.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._pipelines: list[weakref.ref[Pipeline]] = []

    def add(self, pipeline: Pipeline) -> None:
        """Count this one from now on. The caller holds the lock."""
        self._pipelines = [known for known in self._pipelines if known() is not None]
        self._pipelines.append(weakref.ref(pipeline))

    def to_come_bytes(self) -> int:
        """Memory that these pipelines are going to occupy and do not yet. The caller holds the lock."""
        found = [known() for known in self._pipelines]
        return sum(pipeline.to_come_bytes for pipeline in found if pipeline is not None)

    def forget(self) -> None:
        """In a forked child: it has none of its parent's pipelines, and a thread of the parent may hold the lock."""
        self.lock = threading.Lock()
        self._pipelines = []


OPEN_PIPELINES = _OpenPipelines()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=OPEN_PIPELINES.forget)
