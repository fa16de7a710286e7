"""A finished sharded model directory -> one with smaller weights, shard by shard.

```
how         the caller's arguments about rounding, checked
joined      the graphs of a directory's shards, with tables and head put back
sharing     files that both directories have in common
rounding    each shard rounded and written
mixed       the shards that stay wider, for a given error
convert     the whole line
draft       a rounded copy beside the model that it guesses for
```
"""
