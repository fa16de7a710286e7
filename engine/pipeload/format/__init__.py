"""The description of a sharded model directory; the only code that exporter and engine share.

```
records       the parts of a manifest
pages         sizes in whole pages
dims          symbolic dimensions -> sizes
faults        inconsistencies of a manifest
manifest      pipeload.json: read, written, checked
safetensors   the header of a weights file, checked against the manifest
graphs        what a graph takes from files, and what it makes, checked against the manifest
graph_sizes   the sizes of its tensors, checked against the manifest: nodes, inline, extents
caches        the inputs and outputs that are KV caches, and their growth
```
"""
