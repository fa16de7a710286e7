"""From texts and images to answers: the work of a task before and after the passes through the model.

```
arguments    checks of callers' arguments
model_files  the settings in a model's own files
runner       the engine's interface to a task
text/        texts <-> token ids
images       images -> pixel values
embed/       texts -> vectors
classify/    texts, pairs of texts, images -> labels; tokens -> entities
answer/      questions and texts -> stretches of the texts
fill/        texts with gaps -> tokens
chat/        messages -> prompt
generate/    prompts -> texts
```

The semantics are those of transformers and sentence-transformers; neither is imported. The tokenizers library, Pillow
and Jinja (extras `text`, `vision` and `chat`) are imported at the first call that needs them. Their errors become
pipeload's errors; an error raised by a caller's own function (a streamer, a logits processor) reaches the caller
unchanged.
"""

from __future__ import annotations

__all__: list[str] = []
