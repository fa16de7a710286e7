"""The computer that this process runs on: the only package that opens /proc and /sys.

```
sizes         "256MB" <-> bytes
files         opened and read in one place; written whole or not at all
user_cache    what is kept between processes, and where
cgroups       limits on memory and reading
memory        RSS, its peak, and what is left
heap          the C library's heap
hardware      processors, memory, storage device
threads       jobs at the same time
```
"""
