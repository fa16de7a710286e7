"""Messages -> a prompt.

```
sandbox    bounds on the work of a template
template   the model's chat template
chat       messages -> token ids
```
"""
