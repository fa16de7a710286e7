"""Texts <-> token ids.

```
growth      bounds for a tokenizer's rules
pairs       one or two texts, as callers pass them
tokenizer   the model's tokenizer
padding     sequences of different lengths -> rectangles
batches     encoded texts, batch by batch through a model
```
"""
