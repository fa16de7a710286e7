"""From texts and images to answers: what a task does before and after the passes through the model.

```
arguments    what callers pass, checked
model_files  the settings in a model's own files
runner       what a task asks of the engine
text/        texts <-> token ids
images       images -> pixel values
embed/       texts -> vectors
classify/    texts, images -> labels; tokens -> entities
chat/        messages -> prompt
generate/    prompts -> texts
```

The semantics are those of transformers and sentence-transformers; neither is imported. The tokenizers library, Pillow
and Jinja (extras `text`, `vision` and `chat`) are imported at the first call that needs them. What they raise is an
error of pipeload; what a caller's own function raises (a streamer, a logits processor) comes back as it is.
"""

from __future__ import annotations

__all__: list[str] = []
