"""How fast this machine reads and runs a model.

```
example_inputs   made-up inputs
bandwidth        how fast files are read
stopwatch        how long shards take
profiler         machine, process and model -> Profile
profile_store    profiles in files
```
"""
