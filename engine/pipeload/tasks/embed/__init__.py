"""Texts -> vectors.

```
pooling   hidden states -> one vector
embed     from texts to vectors
```
"""
