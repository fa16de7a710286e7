"""Files -> memory.

```
buffers       page-aligned memory
digests       sha256 of a file and of its ranges
model_files   the directory's files, inside it and as they were exported
stamps        which files were checked before
weights       shard files -> buffers
```
"""
