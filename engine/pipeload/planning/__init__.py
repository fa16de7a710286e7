"""Plans: how a model is going to run. Pure: no I/O, no threads.

```
profile     measured facts about machine, process and model
needs       memory of a pass beside weights
rates       speeds from a profile, or assumed without one
footprint   memory of a shard's buffer, session and copies
layouts     ways to use the memory that is left for weights
schedule    duration of a pass, and its lower bound
drafting    does a model's own draft pay?
planner     manifest + profile + budget -> Plan
learning    trace of a pass -> better profile
replanner   another plan when needs, memory or the profile change
placement   which node of several runs which shards
adapting    when a model on several nodes moves to another placement
```
"""
