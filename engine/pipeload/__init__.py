"""pipeload runs transformer models that do not fit into memory, on CPUs, from standard ONNX shards.

Modules, in the order in which data flows through them:

```
errors     the exception tree
manifest   pipeload.json: what a sharded model directory holds; its parts, in order:
manifest_records   what it consists of
dims               symbolic dimensions -> sizes
manifest_faults    what is wrong with it
examples           made-up inputs
caches             KV caches with room for more tokens
head               the largest logits of a head's slices
files      a file that appears whole or not at all
user_cache what is kept between processes, and where
memory     sizes, RSS, cgroup limits
machine    processors, memory, storage device
trace      what every agent did, and when
buffers    page-aligned memory
stamps     which files were checked before
headers    what a weights file says about itself, held against the manifest
storage    shard files -> buffers
session    one shard's onnxruntime session over a buffer
profile    what the planner has to know about machine, process and model, and where that is kept
footprint  what a pass needs beside weights
schedule   how long a pass takes, and the least that it could
speed      what a profile says, or what is assumed without one
layouts    ways to use the memory that is left for weights
planner    manifest + profile + budget -> Plan
replanner  another plan when needs, memory or what is known change
stats      what happened, in figures
budget     byte reservations in plan order
exchange   where the agents meet
agents     Loading, Inference and Daemon Agents
forward    one pass over the shards
pipeline   the threads
recording  a trace, read back from its file
timeline   a picture of a trace
bandwidth  how fast files are read
stopwatch  how long shards take
profiler   measures machine, process and model -> Profile
batches    several inputs in one pass
state      KV caches of one batch
model      the facade
tasks/     embed, classify, generate, chat
bench/     pipeload beside other ways to run a model
cli/       the commands
```
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipeload.errors import (
    BudgetError,
    ClosedError,
    ConfigError,
    ExportError,
    LoadError,
    ManifestError,
    PipeloadError,
    RunError,
    ShardError,
    TruncationWarning,
)

if TYPE_CHECKING:
    from pipeload.model import Model, load
    from pipeload.planner import Plan
    from pipeload.profile import Profile
    from pipeload.state import DecodeState
    from pipeload.tasks.generate import Generation, Session
    from pipeload.tasks.streaming import TextStream

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "ClosedError",
    "ConfigError",
    "DecodeState",
    "ExportError",
    "Generation",
    "LoadError",
    "ManifestError",
    "Model",
    "PipeloadError",
    "Plan",
    "Profile",
    "RunError",
    "Session",
    "ShardError",
    "TextStream",
    "TruncationWarning",
    "load",
]

_HOMES = {
    "DecodeState": "state",
    "Generation": "tasks.generate",
    "Model": "model",
    "Plan": "planner",
    "Profile": "profile",
    "Session": "tasks.generate",
    "TextStream": "tasks.streaming",
    "load": "model",
}
"""Modules of what is imported when it is first used: with onnxruntime and NumPy that takes up to seconds, in which
`__main__` already has to answer Ctrl-C."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
