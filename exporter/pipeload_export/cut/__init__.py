"""Where shards begin and end.

```
flow        where one activation flows
signature   equal for parts of a graph that do the same
blocks      where the blocks begin and end
tables      embedding tables taken out
head        the vocabulary head cut
placement   each node to its shard; edges
caches      what comes back at the next step
```
"""
