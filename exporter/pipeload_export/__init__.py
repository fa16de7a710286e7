"""The exporter: from a checkpoint or an ONNX file to a sharded model directory.

Modules, in the order in which data flows through them:

```
extra       is the extra [export] installed?
task        what a model is for, and which transformers class that means
catalog     recipes for models by name, from packages or with seeded weights
hub         a model of the Hugging Face hub -> a local checkpoint folder
source      SOURCE -> a checkpoint, or an ONNX graph with its side files
folder      what lies in a checkpoint folder
checkpoint  a checkpoint -> an unsplit ONNX graph, in a child process
tracing     what that process does
split       graph -> shards; its parts, in order:
loading       the file as a sorted graph whose weights stay in it
graph         that graph
fold          constants folded, names resolved
attention     how layers read their caches
caches        caches written in place
quantised     these caches as int8
flow, cuts    where one activation flows, where the blocks begin and end
tables, head  embedding tables taken out, the vocabulary head cut
placement     each node to its shard; edges, caches
fuse          a shard optimised offline by onnxruntime
plans, trial, sampling, activations   sample runs of shards -> shapes, live bytes
structure     the id of what shards have in common
weights, writer   safetensors files, graph files
merge       the shards -> one graph over the same weights, to compare with
samples     seeded inputs that suit a model
chain       the shards one after another, and the unsplit graph, in plain onnxruntime
compare     the answers of the two, and by how much they differ
graphcheck  is a shard's graph valid, and does it point to the weights of the manifest?
verify      files, graphs and answers of a sharded model directory
staging     a folder that becomes the target at once, or never
package     all of it, in order: `export`
```

Importing this package needs only what the engine needs; torch, onnx and the others are imported when they are used.
"""

from __future__ import annotations

from pipeload_export.package import KvCache, export
from pipeload_export.verify import Report, verify

__all__ = ["KvCache", "Report", "export", "verify"]
