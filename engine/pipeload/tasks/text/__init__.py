"""Texts <-> token ids.

```
tokenizer   the model's tokenizer
padding     sequences of different lengths -> rectangles
```
"""
