"""Where shards begin and end.

```
flow        where one activation flows
blocks      where the blocks begin and end
tables      embedding tables taken out
head        the vocabulary head cut
placement   each node to its shard; edges, caches
```
"""
