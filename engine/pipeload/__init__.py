"""pipeload runs transformer models that do not fit into memory, on CPUs, from standard ONNX shards.

Modules, in the order in which data flows through them:

```
errors     the exception tree
manifest   pipeload.json: what a sharded model directory holds
user_cache what is kept between processes, and where
memory     sizes, RSS, cgroup limits
trace      what every agent did, and when
buffers    page-aligned memory
stamps     which files were checked before
storage    shard files -> buffers
session    one shard's onnxruntime session over a buffer
profile    what the planner has to know about machine and process
profiler   measures them -> Profile
footprint  what a pass needs beside weights
schedule   how long a pass takes, and the least that it could
planner    manifest + profile + budget -> Plan
replanner  another plan when needs, memory or what is known change
stats      what happened, in figures
budget     byte reservations in plan order
exchange   where the agents meet
agents     Loading, Inference and Daemon Agents
forward    one pass over the shards
pipeline   the threads
batches    several inputs in one pass
state      KV caches of one batch
model      the facade
tasks/     embed, classify, generate
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
