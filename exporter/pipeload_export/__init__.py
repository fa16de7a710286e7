"""The exporter: from a checkpoint or an ONNX file to a sharded model directory.

Packages and modules, in the order in which data flows through them:

```
extra      is the extra [export] installed?
boundary   exceptions of the system and of libraries -> ExportErrors
staging    a folder that becomes the target at once, or never; all temporary work lies in it
source/    the SOURCE that a user names -> an unsplit ONNX graph
graph/     that graph, sorted and without detours
rewrite/   KV caches written in place, weights rounded, a GGUF file's blocks put in
cut/       where shards begin and end
shard/     each shard optimised, sampled, described
write/     safetensors files, graph files, the manifest
check/     hashes, graphs and answers of the result
split      graph -> shards: the whole line on one page
build      the graph -> a directory: shards, side files, manifest
convert/   a finished directory -> one with smaller weights
export     all of it, in order
```

Importing this package needs no more than the engine does; torch, onnx and the others are imported when they are used.
"""

from __future__ import annotations

from pipeload_export.check.verify import Report, verify
from pipeload_export.convert.convert import convert
from pipeload_export.convert.draft import DraftWeights
from pipeload_export.convert.how import BlockSize, RoundedWeights
from pipeload_export.export import KvCache, Weights, export

__all__ = [
    "BlockSize",
    "DraftWeights",
    "KvCache",
    "Report",
    "RoundedWeights",
    "Weights",
    "convert",
    "export",
    "verify",
]
