"""The agents: read upwards from one shard to the threads.

```
session        one shard's onnxruntime session over a buffer
top_logits     the largest logits of a head's slices
cache_room     KV caches with room for more tokens
sweep          one pass over the shards
reservations   bytes of the budget, in plan order
messages       tasks and results that pass between the agents
deadlines      by when calls are to be done
callers        callers that may leave
requests       the queue of calls
joining        rows of several calls in one batch
shared_weights weights that resident shards have in common
residents      shards and parts kept between sweeps, and their packing
exchange       where the agents meet
agents         Loading, Inference and Daemon Agents: their loops
weights_memory reservations, buffers, and freed memory
affinity       cores that read, cores that compute
loader         a Loading Agent's work on a task
lent_outputs   outputs still kept by callers
room           the next pass: its plan, its memory, its loaders
ledger         passes in figures
pipeline       starts and ends the agents, and plans between sweeps
open_pipelines all of this process
```
"""
