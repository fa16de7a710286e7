"""Are the vectors of `embed` those that sentence-transformers makes of the same texts?

`parity` compares the outputs of the graph. What is done to a text before, and to its tokens' vectors after (pooling and
the other modules of modules.json), only shows here.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pipeload
from pipeload.errors import ConfigError, ExportError, TruncationWarning
from pipeload.format.closeness import range_of
from pipeload.format.manifest import Manifest, Vectors, Verification
from pipeload.notify import Notify
from pipeload.storage.model_files import ModelFiles
from pipeload.tasks.embed.embed import check_embed
from pipeload.tasks.runner import FilesOnly
from pipeload.tasks.text.tokenizer import Tokenizer
from pipeload_export.check.compare import distance, limit_of_source
from pipeload_export.check.questions import affordable_tokens
from pipeload_export.check.running import given_room
from pipeload_export.extra import has_module, how_to_install
from pipeload_export.source.folder import read_json
from pipeload_export.source.sentences import LIBRARY, Call, Sentences, ask_sentences
from pipeload_export.source.tracing import Request

__all__ = ["MODULES", "Asked", "ask_vectors", "makes_vectors", "obstacle"]

MODULES = "modules.json"
"""The file that names the modules of sentence-transformers."""

_SHORT = "a cat"
_MIDDLE = "  Two  Cats, één ÜBER-dog;\nand a THIRD line of text, which is longer than the first. "
_WORDS = ("cat", "a", "mat", "while", "seven", "large", "dogs", "ran", "through", "old", "green", "gardens", "and")
_SEED = 20241128
_MOST_PROMPTS = 3
_SHOWN = 40


def makes_vectors(directory: Path, manifest: Manifest) -> bool:
    """Whether `embed` takes the model and its texts, and by modules of sentence-transformers.

    Raises:
        ShardError: a file of sentence-transformers is missing or damaged.
        RunError, LoadError: the process has no memory left, or too little of something else, to find out.
    """
    files = ModelFiles(directory, manifest, verify=False)
    if manifest.task != "feature-extraction" or not {MODULES, "tokenizer.json"} <= files.records.keys():
        return False
    try:
        check_embed(FilesOnly(directory, manifest, files))
    except ConfigError:
        return False
    return True


def obstacle(directory: Path, manifest: Manifest, request: Request) -> str | None:
    """Why its vectors cannot be compared with those of sentence-transformers, and what helps; None if they can."""
    # sentence-transformers runs the code of a local folder without being asked to.
    foreign = [kind for kind in _modules(directory) if not kind.startswith(f"{LIBRARY}.")]
    if foreign and not request.trust_remote_code:
        return (
            f"{MODULES} names '{foreign[0]}', Python code of the checkpoint's own. Read that code, and if you trust "
            "it, export with --trust-remote-code."
        )
    if manifest.missing_weights:
        return "weights of the checkpoint are missing, and it puts other random numbers in their place."
    if not has_module(LIBRARY):
        return f"it is not installed. {how_to_install('sentence')} installs it."
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What was asked and answered, before the engine begins.

    Attributes:
        manifest: the model's.
        calls: the texts.
        answers: of sentence-transformers.
        modules: the kinds of its modules, in order, for messages.
        longest: tokens of the longest text, as the model takes it.
        cut: whether that text has more tokens than the model takes.
    """

    manifest: Manifest
    calls: tuple[Call, ...]
    answers: Sentences
    modules: tuple[str, ...]
    longest: int
    cut: bool

    def compare(self, model: pipeload.Model, remedy: str, progress: Notify) -> Vectors:
        """Hold the vectors of the streamed model against those of sentence-transformers.

        Args:
            model: the model.
            remedy: ends the message about vectors that differ: what the user can do.
            progress: called with the name of the step, the part done, and the whole.

        Raises:
            ExportError: a vector differs by more than its limit, or has another length.
            PipeloadError: `embed` fails.
        """
        span = range_of(np.concatenate([array.ravel() for array in self.answers.vectors.values()]), "float32")
        equal: list[str] = []
        worst = Verification(
            output="embed", max_abs_error=0.0, max_rel_error=0.0, limit=limit_of_source(self.manifest, 0.0, span)
        )
        for number, wanted in self.answers.vectors.items():
            progress("compare the vectors", number, len(self.calls))
            call = self.calls[number]
            found = _embedded(model, call)
            if found is None:
                continue
            one = self._held(call, wanted, found, span, self.answers.effects[number], equal, remedy)
            worst = max(worst, one, key=lambda each: each.max_rel_error / each.limit)
            equal.append(call.name)
        progress("compare the vectors", len(self.calls), len(self.calls))
        return Vectors(cases=tuple(equal), longest=self.longest, cut=self.cut, difference=worst)

    def _held(
        self,
        call: Call,
        wanted: NDArray[Any],
        found: NDArray[Any],
        span: float,
        effect: float,
        equal: list[str],
        remedy: str,
    ) -> Verification:
        fault = "The vectors of embed are not those that sentence-transformers makes"
        named = f"{MODULES} names {', '.join(self.modules)}"
        alike = f"those for {'; '.join(equal)} are equal" if equal else "no vectors are equal"
        if wanted.shape != found.shape:
            raise ExportError(
                f"{fault}: for {call.name} they are {list(found.shape)} instead of {list(wanted.shape)}; {named}. "
                f"{remedy}"
            )
        limit = limit_of_source(self.manifest, effect, span)
        error = distance(wanted, found)
        most = float(error.max(initial=0.0))
        if not most / span <= limit:
            text = int((~(error / span <= limit)).any(axis=1).argmax())
            own, its = (f"{float(np.linalg.norm(array[text])):.4g}" for array in (found, wanted))
            raise ExportError(
                f"{fault}: for {call.name}, that of text {text + 1} ({call.texts[text][:_SHOWN]!r}) differs by "
                f"{float(np.nanmax(error[text])) / span:.3g} of their range, and the limit is {limit:.2g}. It has the "
                f"length {own} instead of {its}; {named}; {alike}. {remedy}"
            )
        return Verification(output="embed", max_abs_error=most, max_rel_error=most / span, limit=limit)


def ask_vectors(directory: Path, manifest: Manifest, request: Request, work: Path, progress: Notify) -> Asked | None:
    """Ask sentence-transformers for the vectors of a handful of texts; None where they cannot be compared.

    Args:
        directory: the sharded model directory.
        manifest: its manifest.
        request: the source.
        work: an existing folder, in which a new one is made for the answers.
        progress: called with the name of the step, the part done, and the whole.

    Raises:
        ExportError: sentence-transformers cannot open the checkpoint or answers nothing, or memory is short.
        ShardError, RunError, LoadError: as `makes_vectors`.
    """
    if not makes_vectors(directory, manifest) or obstacle(directory, manifest, request):
        return None
    tokenizer = Tokenizer(FilesOnly(directory, manifest, ModelFiles(directory, manifest, verify=False)))
    most = affordable_tokens(manifest, read_json(directory / "config.json"), request.weight_bytes)
    text = _long_text(tokenizer, most)
    calls = tuple(_calls(directory, text))
    answers = ask_sentences(request, work / "sentences", calls, progress)
    if not answers.vectors:
        raise ExportError(
            f"The vectors of {request.name} cannot be compared with those of sentence-transformers, which makes none "
            f"itself ({next(iter(answers.errors.values()))}). Leave the comparison out with --no-verify."
        )
    encoded = tokenizer.encode(text)
    kinds = tuple(kind.rpartition(".")[2] for kind in _modules(directory))
    return Asked(
        manifest=manifest, calls=calls, answers=answers, modules=kinds, longest=len(encoded.ids), cut=encoded.cut
    )


def _calls(directory: Path, long: str) -> Iterator[Call]:
    """Texts alone and of several lengths together, without a prompt, with the default one, and with the model's own."""
    yield Call(name="1 short text without a prompt", texts=[_SHORT], prompt="")
    yield Call(name="1 long text without a prompt", texts=[long], prompt="")
    yield Call(name="3 texts of several lengths without a prompt", texts=[_SHORT, long, _MIDDLE], prompt="")
    yield Call(name="2 texts with the default prompt", texts=[_MIDDLE, _SHORT])
    prompts = read_json(directory / "config_sentence_transformers.json").get("prompts", {})
    named = {text: name for name, text in reversed(prompts.items()) if text}
    for name in sorted(named.values())[:_MOST_PROMPTS]:
        yield Call(name=f"2 texts with the prompt '{name}'", texts=[_SHORT, long], prompt_name=name)


def _long_text(tokenizer: Tokenizer, most: int) -> str:
    """Varied words of more tokens than the model takes, or of about `most` tokens."""
    random, count = np.random.default_rng(_SEED), 8
    while True:
        text = " ".join(random.choice(_WORDS, count))
        found = tokenizer.encode(text)
        # A vocabulary may have nothing of a word.
        if found.cut or 2 * max(count, len(found.ids)) > most:
            return text
        count *= 2


def _embedded(model: pipeload.Model, call: Call) -> NDArray[Any] | None:
    """The vectors of `embed`; None where it refuses the prompt, which is no wrong answer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        try:
            embed = partial(model.embed, call.texts, prompt=call.prompt, prompt_name=call.prompt_name)
            return given_room(model, embed)
        except ConfigError:
            if call.prompt_name is None:
                raise
            return None


def _modules(directory: Path) -> list[str]:
    """The classes of the modules of sentence-transformers."""
    return [str(module["type"]) for module in json.loads((directory / MODULES).read_bytes())]
