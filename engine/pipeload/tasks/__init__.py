"""From texts and images to answers: what a task does before and after the passes through the model.

```
texts, images --> text.py, vision.py --> arrays --> Runner.run or Decoder.step --> arrays
                                                                                      |
              embed.py (pooling.py), classify.py (labels.py, entities.py), generate.py
                                                                                      |
                                                     vectors, labels, entities, texts <
```

Generation has modules of its own: `options.py` is what a call asks for, `prompts.py` what it is given, `reading.py`
what the decoder has in its caches, `decoding.py` the loop of passes, `speculation.py` guesses tokens for them,
`sampling.py` chooses tokens, `stopping.py` finds stop strings, `sequence.py` is one text while it grows,
`streaming.py` hands text to another thread. `chat.py` makes a prompt of messages, with the model's chat template,
which `template.py` runs in Jinja's sandbox. `batch.py` makes rectangles of sequences, `config.py` reads the model
directory's own files (`config.json` ...), and `runner.py` says what a task asks of the engine. The semantics are those
of transformers and sentence-transformers; neither is imported. The tokenizers library, Pillow and Jinja (extras
`text`, `vision` and `chat`) are imported at the first call that needs them.
"""

from __future__ import annotations

__all__: list[str] = []
