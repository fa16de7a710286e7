"""Texts -> the vectors that sentence-transformers itself makes of them with a checkpoint, in a child process.

It reads modules.json and all that belongs to it by its own code, from the text to the last module: what `embed` is held
against.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from pipeload.errors import ExportError
from pipeload.notify import Notify
from pipeload_export.source.asking import answering_bytes
from pipeload_export.source.older_form import view_of
from pipeload_export.source.reference import MAX_ERROR_CHARACTERS, nudge, untouched
from pipeload_export.source.refused import Refused, reason
from pipeload_export.source.tracer import attention_of, serve
from pipeload_export.source.tracing import Request, run_child
from pipeload_export.source.widened import widen

__all__ = ["LIBRARY", "Call", "Sentences", "ask_sentences", "run_child_sentences"]

LIBRARY = "sentence_transformers"
_CHILD = (
    "import sys; from pipeload_export.source.sentences import run_child_sentences; run_child_sentences(*sys.argv[1:])"
)
_ANSWERS = "sentences.json"
_STEP = "ask sentence-transformers"


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """Texts that are embedded by one call.

    Attributes:
        name: for messages.
        texts: the texts.
        prompt: as `embed` takes it, and sentence-transformers' `encode` too.
        prompt_name: likewise.
    """

    name: str
    texts: list[str]
    prompt: str | None = None
    prompt_name: str | None = None


class Calls(msgspec.Struct, frozen=True, kw_only=True):
    """The parent's request to the child."""

    model: Request
    calls: list[Call]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentences:
    """What sentence-transformers says.

    Attributes:
        vectors: number of each call that it answered -> `[texts, hidden]` float32.
        effects: number of a call -> how far its vectors move when the tokens' embeddings change by 1e-7 of their size.
        errors: number of a call -> why sentence-transformers itself gives no answer.
        version: of the library.
    """

    vectors: Mapping[int, NDArray[Any]]
    effects: Mapping[int, float]
    errors: Mapping[int, str]
    version: str


def ask_sentences(request: Request, folder: Path, calls: Sequence[Call], progress: Notify) -> Sentences:
    """Let sentence-transformers answer, in a child process that is gone when this returns.

    Args:
        request: the source, a checkpoint folder.
        folder: a new folder for the answers.
        calls: the texts.
        progress: told that it is at work.

    Raises:
        ExportError: there is not enough memory, or sentence-transformers cannot load the checkpoint.
    """
    needed = answering_bytes(request)
    folder.mkdir(parents=True)
    progress(_STEP, 0, len(calls))
    error = run_child(
        _CHILD,
        Calls(model=request, calls=list(calls)),
        folder,
        fact=f"Comparing with {request.name} in sentence-transformers",
        needed=needed,
        online=request.trust_remote_code,
        tick=lambda: progress(_STEP, len(list(folder.glob("*.npy"))), len(calls)),
    )
    if error:
        raise ExportError(
            f"The vectors of {request.name} cannot be compared with those of sentence-transformers, which does not "
            f"open it: {error} Or leave the comparison out with --no-verify."
        )
    progress(_STEP, len(calls), len(calls))
    found = json.loads((folder / _ANSWERS).read_bytes())
    effects, errors = ({int(n): value for n, value in found[name].items()} for name in ("effects", "errors"))
    vectors = {number: np.load(_file(folder, number)) for number in effects}
    return Sentences(vectors=vectors, effects=effects, errors=errors, version=found["version"])


def run_child_sentences(request_path: str, folder: str, parent: str) -> None:
    """Carry out the request, and leave the answers in the folder."""
    serve(Calls, _answer, request_path, folder, parent)


def _answer(asked: Calls, folder: Path) -> None:
    warnings.simplefilter("ignore")
    import sentence_transformers

    model = _loaded(asked.model, folder)
    effects: dict[int, float] = {}
    errors: dict[int, str] = {}
    for number, call in enumerate(asked.calls):
        try:
            found, moved = (_encoded(model, call, nudged=nudged) for nudged in (False, True))
        except Exception as error:  # noqa: BLE001 - it takes no such text, or has no positions for it
            errors[number] = reason(error, MAX_ERROR_CHARACTERS)
            continue
        np.save(_file(folder, number), found)
        change = np.abs(moved.astype(np.float64) - found)
        effects[number] = float(change[np.isfinite(change)].max(initial=0.0))
    answers = {"effects": effects, "errors": errors, "version": sentence_transformers.__version__}
    (folder / _ANSWERS).write_text(json.dumps(answers))


def _loaded(request: Request, folder: Path) -> Any:
    """The checkpoint in sentence-transformers: float32, with the attention that it was traced with, without pickles."""
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import AutoConfig

    trusted = request.trust_remote_code
    source = view_of(Path(str(request.folder)), folder.with_name("checkpoint"))
    if request.widened_bytes:
        widen(source)
    options: dict[str, Any] = {"trust_remote_code": trusted, "local_files_only": not trusted}
    config = AutoConfig.from_pretrained(source, **options)
    kwargs = {"dtype": torch.float32, "use_safetensors": True, **attention_of(config)}
    model = SentenceTransformer(str(source), device="cpu", model_kwargs=kwargs, **options).eval()
    if not len(model):
        raise Refused("its modules.json names no module. Fetch it again.")
    return model


def _encoded(model: Any, call: Call, *, nudged: bool) -> NDArray[Any]:
    tokens = getattr(model[0], "auto_model", None)
    with untouched(model), nudge(tokens) if nudged and tokens is not None else nullcontext():
        made: NDArray[Any] = model.encode(
            call.texts, show_progress_bar=False, prompt=call.prompt, prompt_name=call.prompt_name
        )
    return made


def _file(folder: Path, number: int) -> Path:
    return folder / f"vectors.{number}.npy"
