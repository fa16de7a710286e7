"""Texts -> vectors.

```
pooling   hidden states -> one vector
modules   what is done to that vector
embed     from texts to vectors
```
"""
