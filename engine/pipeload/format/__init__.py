"""What a sharded model directory says about itself; all that the exporter shares with the engine.

```
records       what a manifest consists of
pages         sizes in whole pages
dims          symbolic dimensions -> sizes
faults        what is wrong with a manifest
manifest      pipeload.json: read, written, checked
safetensors   what a weights file says about itself, held against the manifest
caches        which inputs and outputs are KV caches, and how they grow
```
"""
