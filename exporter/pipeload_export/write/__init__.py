"""A sharded model directory on disk.

```
weights   safetensors files
shared    equal weights of several shards
shards    graph files, manifest
```
"""
