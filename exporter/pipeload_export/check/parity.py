"""Does the streamed model give the answers of its source, transformers' eager model in float32?

`compare` holds the shards against the graph that they were cut from; a fault of that graph only shows here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pipeload
from pipeload.errors import ConfigError, ExportError, PipeloadError, RunError
from pipeload.format.closeness import range_of
from pipeload.format.manifest import Manifest, Parity, Verification
from pipeload.notify import Notify
from pipeload.storage.model_files import ModelFiles
from pipeload.tasks.model_files import read_config
from pipeload_export.check.accuracy import text_inputs
from pipeload_export.check.beginning import Traits, beginning
from pipeload_export.check.compare import distance, limit_of_source
from pipeload_export.check.questions import Prompt, Question, Questionnaire, questionnaire
from pipeload_export.check.running import given_room, opened
from pipeload_export.check.vectors import ask_vectors
from pipeload_export.source.asking import Answers, ask, visible
from pipeload_export.source.tracing import Request

__all__ = ["check_parity"]


def check_parity(
    directory: Path, manifest: Manifest, request: Request, work: Path, progress: Notify, remedy: str
) -> Parity:
    """Compare the streamed model with its source, on lengths from 1 to beyond every boundary in the config.

    Args:
        directory: the sharded model directory.
        manifest: its manifest.
        request: the source.
        work: an existing folder, in which a new one is made for questions and answers.
        progress: called with the name of the step, the part done, and the whole.
        remedy: ends the message about answers that differ: what the user can do.

    Raises:
        ExportError: an output of the streamed model, or a vector of `embed`, differs by more than its limit; the engine
            cannot run it; or the source cannot be asked.
    """
    positions = read_config(ModelFiles(directory, manifest, verify=False)).max_positions
    asked = questionnaire(manifest, directory, weight_bytes=request.weight_bytes, positions=positions)
    answers = ask(
        request,
        work / "source",
        [question.inputs for question in asked.questions],
        [prompt.ids for prompt in asked.prompts],
        asked.new_tokens,
        [spec.name for spec in manifest.free_outputs],
        progress,
    )
    if not answers.outputs:
        raise ExportError(
            f"{request.name} cannot be compared with what was exported: the source itself does not answer "
            f"({next(iter(answers.errors.values()), 'no inputs')}). Leave the comparison out with --no-verify."
        )
    silences = [answers.silence(number) for number in range(len(asked.prompts))]
    if silences and all(silences):
        raise ExportError(
            f"{request.name} cannot be compared with what was exported: the source itself makes no text "
            f"({silences[0]}). Leave the comparison out with --no-verify."
        )
    comparison = _Comparison(manifest, asked, answers, remedy)
    sentences = ask_vectors(directory, manifest, request, work, progress)
    # The source is gone when the engine begins.
    try:
        with opened(directory) as model:
            comparison.run(model, progress)
            vectors = sentences.compare(model, remedy, progress) if sentences else None
    except ExportError:
        raise
    except PipeloadError as error:
        raise ExportError(f"The engine cannot run what was exported: {error}") from error
    found = comparison.result()
    if sentences is None:
        return found
    versions = {**found.versions, "sentence-transformers": sentences.answers.version}
    return replace(found, vectors=vectors, versions=versions)


@dataclass(slots=True)
class _Worst:
    """The largest difference of an output so far, absolute and in parts of the range; `limit` is that of its case."""

    error: float = 0.0
    relative: float = 0.0
    limit: float = 0.0


@dataclass(slots=True)
class _Comparison:
    manifest: Manifest
    asked: Questionnaire
    answers: Answers
    remedy: str
    _spans: dict[str, float] = field(default_factory=dict)
    _worst: dict[str, _Worst] = field(default_factory=dict)
    _equal_cases: list[Traits] = field(default_factory=list)
    _refused: list[int] = field(default_factory=list)
    _tokens: int = 0
    _equal: int = 0

    def run(self, model: pipeload.Model, progress: Notify) -> None:
        """Answer all questions with the engine. Raises ExportError at the first that is answered otherwise."""
        total = len(self.asked.questions) + len(self.asked.prompts)
        for number, question in enumerate(self.asked.questions):
            progress("compare with the source", number, total)
            if number in self.answers.outputs:
                self._question(model, number, question)
            else:
                self._refused.append(question.length)
        for number, prompt in enumerate(self.asked.prompts):
            progress("compare with the source", len(self.asked.questions) + number, total)
            if self.answers.silence(number) is None:
                self._prompt(model, number, prompt)
            else:
                self._refused.append(prompt.ids.shape[1] + self.asked.new_tokens)
        progress("compare with the source", total, total)

    def result(self) -> Parity:
        """The record for the manifest."""
        lengths = [case.length for case in self._equal_cases]
        reached = max([*lengths, *self._refused], default=0)
        return Parity(
            cases=tuple(case.name for case in self._equal_cases),
            longest=max(lengths, default=0),
            beyond=tuple(length for length in self.asked.boundaries if length >= reached),
            outputs=tuple(
                Verification(output=name, max_abs_error=one.error, max_rel_error=one.relative, limit=one.limit)
                for name, one in self._worst.items()
            ),
            tokens=self._tokens,
            tokens_equal=self._equal,
            versions={**self.answers.versions, "pipeload": pipeload.__version__},
        )

    def _question(self, model: pipeload.Model, number: int, question: Question) -> None:
        try:
            found = given_room(model, partial(model.run, question.inputs))
        except (ConfigError, RunError):
            # Some sources make positions beyond their config while they run. To refuse those is no wrong answer.
            if question.length <= min((n for n, key in self.asked.boundaries.items() if "position" in key), default=0):
                raise
            self._refused.append(question.length)
            return
        mask, case = question.inputs.get("attention_mask"), Traits.of_question(question)
        for name in self.answers.outputs[number]:
            self._hold(f"case.{number}", name, case, self.answers.output(number, name), found[name], mask)
        self._equal_cases.append(case)

    def _prompt(self, model: pipeload.Model, number: int, prompt: Prompt) -> None:
        """The source's text, token by token: where the source takes a token, the engine has the same logits."""
        tokens, wanted = self.answers.tokens(number), self.answers.logits(number)
        name = self.manifest.free_outputs[0].name
        length = prompt.ids.shape[1]
        ids, found = prompt.ids, []
        with model.new_state(length + tokens.shape[1]) as state:
            for step in range(tokens.shape[1]):
                inputs = text_inputs(self.manifest, ids, state.length)
                found.append(given_room(model, partial(model.step, inputs, state))[:, -1])
                ids = tokens[:, step : step + 1]
        logits = np.stack(found, axis=1)
        case = Traits.of_prompt(prompt, tokens.shape[1])
        self._hold(f"prompt.{number}", name, case, wanted, logits, None, first=length)
        self._tokens += tokens.size
        self._equal += int((logits.argmax(axis=-1) == tokens).sum())
        self._equal_cases.append(case)

    def _hold(
        self,
        key: str,
        name: str,
        case: Traits,
        wanted: NDArray[Any],
        full: NDArray[Any],
        mask: NDArray[Any] | None,
        first: int = 0,
    ) -> None:
        """Hold an output against the source's."""
        found = full if key.startswith("prompt") else visible(full, mask)
        if wanted.shape != found.shape:
            raise ExportError(
                f"Output '{name}' is {list(full.shape)} for {case.name}, another shape than the source's; "
                f"{self._beginning(case)}. {self.remedy}"
            )
        span = self._span(name)
        limit = limit_of_source(self.manifest, self.answers.effects[key].get(name, 0.0), span)
        error = distance(wanted, found)
        worst = float(error.max(initial=0.0))
        relative = worst / span if np.isfinite(worst) else float("inf")
        if not relative <= limit:
            raise ExportError(self._fault(name, case, error / span, limit, mask, first))
        one = self._worst.setdefault(name, _Worst())
        if relative / limit >= (one.relative / one.limit if one.limit else 0.0):
            one.relative, one.limit, one.error = relative, limit, worst

    def _span(self, name: str) -> float:
        """The range of an output over all that the source said."""
        if name not in self._spans:
            arrays = [self.answers.output(n, name) for n, names in self.answers.outputs.items() if name in names]
            self._spans[name] = range_of(np.concatenate([array.ravel() for array in arrays]), "float32")
        return self._spans[name]

    def _fault(
        self, name: str, case: Traits, error: NDArray[Any], limit: float, mask: NDArray[Any] | None, first: int
    ) -> str:
        """The message that tells where the two part."""
        over = ~(error <= limit)
        if first:
            place = f" from token {first + int(over.any(axis=(0, 2)).argmax())} on"
        elif mask is not None and over.ndim and len(over) == int(mask.sum()):
            wrong = over.any(axis=tuple(range(1, over.ndim)))
            place = f" from token {int(np.nonzero(mask)[1][wrong].min())} on"
        else:
            place = ""
        return (
            f"The streamed model does not answer as its source does. Output '{name}' differs for {case.name}{place} by "
            f"{float(np.nanmax(error)):.3g} of its range, and the limit is {limit:.2g}; {self._beginning(case)}. "
            f"{self.remedy}"
        )

    def _beginning(self, case: Traits) -> str:
        return beginning(case, self._equal_cases, self.asked.boundaries)
