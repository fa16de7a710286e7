"""The description of a sharded model directory; the only code that exporter and engine share.

```
records       the parts of a manifest
pages         sizes in whole pages
dims          symbolic dimensions -> sizes
faults        inconsistencies of a manifest
manifest      pipeload.json: read, written, checked
safetensors   the header of a weights file, checked against the manifest
caches        the inputs and outputs that are KV caches, and their growth
```
"""
