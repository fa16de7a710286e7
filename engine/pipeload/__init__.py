"""pipeload runs transformer models that do not fit into memory, on CPUs, from standard ONNX shards.

Modules, in the order in which data flows through them:

```
errors     the exception tree
manifest   pipeload.json: what a sharded model directory holds
memory     sizes, RSS, cgroup limits
buffers    page-aligned memory
storage    shard files -> buffers
session    one shard's onnxruntime session over a buffer
profile    what the planner has to know about machine and process
profiler   measures them -> Profile
planner    manifest + profile + budget -> Plan
budget     byte reservations in plan order
exchange   where the agents meet
agents     Loading, Inference and Daemon Agents
forward    one pass over the shards
pipeline   the threads
state      KV caches of one batch
model      the facade
tasks/     embed, classify, generate
bench/     pipeload beside other ways to run a model
cli/       the commands
```
"""

from __future__ import annotations

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
)
from pipeload.model import Model, load
from pipeload.planner import Plan
from pipeload.profile import Profile
from pipeload.state import DecodeState

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "ClosedError",
    "ConfigError",
    "DecodeState",
    "ExportError",
    "LoadError",
    "ManifestError",
    "Model",
    "PipeloadError",
    "Plan",
    "Profile",
    "RunError",
    "ShardError",
    "load",
]
