"""A sharded model directory on disk.

```
digests   sha256 of a file and of its parts, on the way
weights   safetensors files
shared    equal weights of several shards
shards    graph files, manifest
```
"""
