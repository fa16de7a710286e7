"""Texts <-> token ids.

```
growth      bounds for a tokenizer's rules
tokenizer   the model's tokenizer
padding     sequences of different lengths -> rectangles
```
"""
