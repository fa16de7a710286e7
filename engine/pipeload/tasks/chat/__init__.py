"""Messages -> a prompt.

```
template   the model's chat template, in Jinja's sandbox
chat       messages -> token ids
```
"""
