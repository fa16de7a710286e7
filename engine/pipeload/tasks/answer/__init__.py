"""A question and a text -> the stretch of the text that answers it.

```
spans    logits of windows -> the best stretches
answer   from questions to answers
```
"""
