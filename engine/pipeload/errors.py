"""The exceptions of pipeload. Everything that pipeload raises on purpose is a `PipeloadError`.

```
PipeloadError
 |- ConfigError     an argument, option or input that cannot be used
 |- ManifestError   the model directory's manifest is missing, damaged or of an unknown version
 |- ShardError      a file of the model directory is missing, truncated, damaged or foreign
 |- BudgetError     the memory budget cannot work for this model and these inputs
 |- LoadError       a shard could not be brought into memory
 |- RunError        ONNX Runtime failed while it ran a shard
 |- ExportError     a model could not be exported, split or verified
 |- ClusterError    a node of the cluster was lost, or the cluster cannot do what was asked
 |- DeadlineError   the call was not done within its `pipeload.deadline`
 '- ClosedError     the model was closed before or during the call
```

Beside it there are three warnings: `TruncationWarning`, texts were cut to the number of tokens that the model takes;
`QuantisationWarning`, the model's answers depend on what is computed together; and `EmbeddingWarning`, `embed` refuses
the model that was exported, or its vectors were not compared.

A message gives the fact, the value and the remedy. The cause, where there is one, is chained (`raise ... from`).

No exception of a library or of the system crosses the API: `foreign.foreign_errors` wraps every call that may raise
one. Exceptions of the caller's own functions (a progress callback, a streamer, a logits processor) pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

__all__ = [
    "BudgetError",
    "ClosedError",
    "ClusterError",
    "ConfigError",
    "DeadlineError",
    "EmbeddingWarning",
    "ExportError",
    "LoadError",
    "ManifestError",
    "PipeloadError",
    "QuantisationWarning",
    "RunError",
    "ShardError",
    "TruncationWarning",
]


class PipeloadError(Exception):
    """Base of every error that pipeload raises on purpose."""


class ConfigError(PipeloadError, ValueError):
    """An argument, option or input array cannot be used."""


class ManifestError(PipeloadError):
    """The manifest is missing, damaged, inconsistent, or of a version that this pipeload does not know."""


class ShardError(PipeloadError):
    """A file of the model directory is missing, truncated, damaged or foreign."""


class BudgetError(PipeloadError, MemoryError):
    """The memory budget cannot work.

    Attributes:
        needed_bytes: the smallest budget that works for this model and these inputs.
        budget_bytes: the budget that was asked for.
    """

    def __init__(self, message: str, *, needed_bytes: int, budget_bytes: int) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.budget_bytes = budget_bytes

    def __reduce__(self) -> tuple[Callable[..., BudgetError], tuple[str]]:
        # An exception is copied by calling its class with its arguments, which leaves keywords out.
        make = partial(BudgetError, needed_bytes=self.needed_bytes, budget_bytes=self.budget_bytes)
        return make, (str(self),)


class LoadError(PipeloadError):
    """A shard could not be brought into memory: the read failed, or ONNX Runtime refused its graph."""


class RunError(PipeloadError):
    """ONNX Runtime failed while it ran a shard."""


class ExportError(PipeloadError):
    """A model could not be exported, split, verified or packaged."""


class ClusterError(PipeloadError):
    """The cluster cannot do what was asked: it cannot be reached, a node was lost, or no placement works."""


class DeadlineError(PipeloadError, TimeoutError):
    """The call was not done within its `pipeload.deadline`."""


class ClosedError(PipeloadError):
    """The model was closed before or during the call."""


class TruncationWarning(UserWarning):
    """Texts were cut to the tokens that the model takes. No error: `warnings.filterwarnings` silences it."""


class EmbeddingWarning(UserWarning):
    """`embed` refuses the exported model, while `run` takes it, or its vectors were not compared.

    No error: `warnings.filterwarnings` silences it.
    """


class QuantisationWarning(UserWarning):
    """The model's answers depend on what is computed together. No error: `warnings.filterwarnings` silences it."""
