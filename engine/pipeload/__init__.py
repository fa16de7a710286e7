"""pipeload runs transformers larger than RAM, on CPU, with ONNX Runtime.

Packages and modules, each above the ones that use it:

```
errors      the exception tree
foreign     exceptions of libraries -> errors of the tree
notify      progress of long work, for its caller
format/     description of a model directory: manifest, symbolic dimensions, safetensors headers, caches
machine/    this computer: memory, heap, cgroups, processors, files
storage/    shard files -> memory
tracing/    record of every agent's work over time
planning/   manifest + profile + budget -> Plan; pure
pipeline/   Loading, Inference and Daemon Agents, and the messages between them
measuring/  machine, process and model -> Profile
inputs      arrays, joined and taken apart
decode      KV caches between steps
budget      memory that several models share
tasks/      embed, classify, zero_shot, rerank, answer, fill_mask, generate, chat
opening     the process measured, the first plan made, the agents started
model       the facade
cluster/    several machines that run one model together
bench/      pipeload beside other ways to run a model
serve/      models over HTTP
cli/        the commands
```
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipeload.errors import (
    BudgetError,
    ClosedError,
    ClusterError,
    ConfigError,
    DeadlineError,
    EmbeddingWarning,
    ExportError,
    LoadError,
    ManifestError,
    PipeloadError,
    QuantisationWarning,
    RunError,
    ShardError,
    TruncationWarning,
)

if TYPE_CHECKING:
    from pipeload.budget import Budget
    from pipeload.cluster.connecting import connect
    from pipeload.decode import DecodeState
    from pipeload.model import Model, load
    from pipeload.pipeline.deadlines import deadline
    from pipeload.planning.planner import Plan
    from pipeload.planning.profile import Profile
    from pipeload.tasks.answer.spans import Answer
    from pipeload.tasks.classify.entities import Entity
    from pipeload.tasks.classify.labels import Label
    from pipeload.tasks.classify.rerank import Ranked
    from pipeload.tasks.fill.fill_mask import FilledMask
    from pipeload.tasks.generate.generate import Generation
    from pipeload.tasks.generate.sequence import NewToken
    from pipeload.tasks.generate.session import Session
    from pipeload.tasks.generate.streaming import TextStream
    from pipeload.tracing.stats import Stats
    from pipeload.tracing.trace import Progress

# Before anything imports onnxruntime, which otherwise writes an id of this machine and a database of events into the
# user's cache. A value that the user has set stays.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Budget",
    "BudgetError",
    "ClosedError",
    "ClusterError",
    "ConfigError",
    "DeadlineError",
    "DecodeState",
    "EmbeddingWarning",
    "Entity",
    "ExportError",
    "FilledMask",
    "Generation",
    "Label",
    "LoadError",
    "ManifestError",
    "Model",
    "NewToken",
    "PipeloadError",
    "Plan",
    "Profile",
    "Progress",
    "Ranked",
    "QuantisationWarning",
    "RunError",
    "Session",
    "ShardError",
    "Stats",
    "TextStream",
    "TruncationWarning",
    "connect",
    "deadline",
    "load",
]

_HOMES = {
    "Answer": "tasks.answer.spans",
    "Budget": "budget",
    "DecodeState": "decode",
    "Entity": "tasks.classify.entities",
    "FilledMask": "tasks.fill.fill_mask",
    "Generation": "tasks.generate.sequence",
    "Label": "tasks.classify.labels",
    "Model": "model",
    "NewToken": "tasks.generate.sequence",
    "Plan": "planning.planner",
    "Profile": "planning.profile",
    "Progress": "tracing.trace",
    "Ranked": "tasks.classify.rerank",
    "Session": "tasks.generate.session",
    "Stats": "tracing.stats",
    "TextStream": "tasks.generate.streaming",
    "connect": "cluster.connecting",
    "deadline": "pipeline.deadlines",
    "load": "model",
}
"""Name -> module, imported at the name's first use: with onnxruntime and NumPy an import takes up to seconds, in which
`__main__` already has to answer Ctrl-C."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    if sys.platform == "win32":
        raise ImportError(
            "pipeload runs on Linux, whose memory it measures by /proc and cgroups. On Windows, use WSL 2."
        )
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
