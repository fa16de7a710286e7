"""Texts and images -> labels, tokens -> entities.

```
labels     scores -> labels
entities   labels of tokens -> spans of the text
classify   from inputs to answers
```
"""
