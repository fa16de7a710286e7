"""A graph -> a graph whose caches are written in place.

```
attention   how layers read their caches
in_place    caches written in place
int8        these caches as int8
```
"""
