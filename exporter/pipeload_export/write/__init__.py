"""A sharded model directory on disk.

```
digests   sha256 of a file and of its parts, on the way
weights   safetensors files
shards    graph files, manifest
```
"""
