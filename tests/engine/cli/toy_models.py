"""A toy model in the place of `pipeload.Model`, and the call of a command on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

import numpy as np
from tests.engine.tasks.fakes import ToyRunner, manifest, write_bert_tokenizer, write_json
from typer.testing import Result

from pipeload.format.manifest import TensorSpec
from pipeload.tasks.answer import answer
from pipeload.tasks.classify import classify, rerank, zero_shot
from pipeload.tasks.embed import embed
from pipeload.tasks.fill import fill_mask
from pipeload.tracing.stats import Stats


class ToyModel:
    """A runner with the further parts of `pipeload.Model`: tasks as methods, statistics, a context."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.plan = SimpleNamespace(
            budget_bytes=256_000_000, loaders=1, buffers=0, resident=frozenset(), resident_bytes=1, streamed_bytes=0
        )
        self.stats = Stats(passes=2, peak_bytes=123_000_000)
        self.closed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self.manifest.free_inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return tuple(self.manifest.outputs)

    def embed(self, texts: Any, **options: Any) -> Any:
        return embed.embed(self, texts, **options)

    def classify(self, inputs: Any, **options: Any) -> Any:
        return classify.classify(self, inputs, **options)

    def zero_shot(self, texts: Any, labels: Any, **options: Any) -> Any:
        return zero_shot.zero_shot(self, texts, labels, **options)

    def rerank(self, query: Any, documents: Any, **options: Any) -> Any:
        return rerank.rerank(self, query, documents, **options)

    def answer(self, question: Any, context: Any, **options: Any) -> Any:
        return answer.answer(self, question, context, **options)

    def fill_mask(self, texts: Any, **options: Any) -> Any:
        return fill_mask.fill_mask(self, texts, **options)

    def __enter__(self) -> ToyModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closed = True


Call = Callable[..., Result]


def encoder_in(directory: Path) -> ToyRunner:
    write_bert_tokenizer(directory)
    table = np.random.default_rng(0).standard_normal((30, 12)).astype(np.float32)
    return ToyRunner(
        directory,
        manifest("feature-extraction", outputs={"last_hidden_state": ("batch_size", "sequence_length", 12)}),
        lambda inputs: {"last_hidden_state": table[inputs["input_ids"]]},
    )


def classifier_in(directory: Path) -> ToyRunner:
    write_bert_tokenizer(directory)
    write_json(directory, "config.json", {"id2label": {"0": "bad", "1": "good"}})
    return ToyRunner(
        directory,
        manifest("text-classification"),
        lambda inputs: {"logits": np.stack([0 * inputs["input_ids"][:, 1], inputs["input_ids"][:, 1] - 6], 1)},
    )
