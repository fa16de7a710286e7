"""A sharded model directory on disk.

```
weights   safetensors files
shards    graph files, manifest
```
"""
