"""A graph -> a graph without settings, whose caches are written in place.

```
settings    inputs with one useful value
attention   how layers read their caches
in_place    caches written in place
int8        these caches as int8
```
"""
