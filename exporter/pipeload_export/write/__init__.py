"""A sharded model directory on disk.

```
weights   safetensors files
shards    graph files, manifest
staging   a folder that becomes the target at once, or never
```
"""
