"""Messages -> a prompt.

```
sandbox    bounds for what a template does
template   the model's chat template
chat       messages -> token ids
```
"""
