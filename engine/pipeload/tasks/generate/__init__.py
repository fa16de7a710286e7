"""Prompts -> texts.

```
options       what a call asks for
prompts       what it is given
cached_text   what the decoder has in its caches
drafts        guessed tokens
sampling      logits -> tokens
stopping      stop strings
sequence      one text while it grows
loop          sweep after sweep
streaming     text as it appears, in another thread
generate      from prompts to texts
session       a text that goes on
```
"""
