"""The computer that this process runs on: the only package that opens /proc and /sys.

```
sizes         "256MB" <-> bytes
terminal      control characters of strangers, spelled out
files         opened and read in one place; written whole or not at all
user_cache    files that outlast the process
cgroups       limits on memory and reading
memory        RSS, its peak, and free memory
heap          the C library's heap
hardware      processors, memory, storage device
cores         big and little processors, and pinning to them
threads       jobs at the same time
```
"""
