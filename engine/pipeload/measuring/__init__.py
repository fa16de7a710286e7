"""Measures the speed at which this machine reads and runs a model.

```
example_inputs   made-up inputs
bandwidth        bytes per second of reading
lasting          seconds within a quota of processor time
stopwatch        seconds of each shard
profiler         machine, process and model -> Profile
profile_store    profiles in files
```
"""
