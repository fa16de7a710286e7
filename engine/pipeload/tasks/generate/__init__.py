"""Prompts -> texts.

```
options       the arguments of a call
prompts       the prompts of a call
cached_text   texts in the decoder's caches
drafts        guessed tokens
own_draft     the model's own copy that guesses
sampling      logits -> tokens
stopping      stop strings
sequence      one growing text
loop          sweep after sweep
streaming     text as it appears, in another thread
generate      from prompts to texts
session       a text that grows from call to call
```
"""
