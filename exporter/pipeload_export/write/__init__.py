"""A sharded model directory on disk.

```
amount    bytes that are written, and that will be in all
journal   the weights files that are finished, for the next export if this one is killed
weights   safetensors files
shared    equal weights of several shards
shards    graph files, manifest
```
"""
