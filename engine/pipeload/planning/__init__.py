"""How a model is going to run. Pure: no I/O, no threads.

```
profile     what is known about machine, process and model
needs       what a pass needs beside weights
rates       what a profile says, or what is assumed without one
layouts     ways to use the memory that is left for weights
schedule    how long a pass takes, and the least that it could
planner     manifest + profile + budget -> Plan
learning    what a pass has shown -> profile
replanner   another plan when needs, memory or what is known change
```
"""
