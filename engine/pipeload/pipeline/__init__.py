"""The agents: read upwards from one shard to the threads.

```
session        one shard's onnxruntime session over a buffer
top_logits     the largest logits of a head's slices
cache_room     KV caches with room for more tokens
sweep          one pass over the shards
reservations   bytes of the budget, in plan order
messages       what the agents tell one another
requests       calls that wait for a sweep
exchange       where the agents meet
agents         Loading, Inference and Daemon Agents
pipeline       the threads
```
"""
