"""Files -> memory.

```
buffers   page-aligned memory
stamps    which files were checked before
weights   shard files -> buffers
```
"""
