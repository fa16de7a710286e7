"""The operations that faults are tried on: each on a tiny model of a real architecture, in tens of milliseconds."""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from tests.engine.harness import smallest_budget
from tests.engine.tasks.fakes import write_bert_tokenizer, write_gpt_tokenizer
from tests.exporter.models import write_onnx
from tests.models import made_once

import pipeload
import pipeload.cli
from pipeload.cli.ending import INTERRUPTED
from pipeload.errors import BudgetError
from pipeload.tracing.trace import Progress
from pipeload_export import convert, export

__all__ = ["OPERATIONS", "CommandFailed", "Operation", "Place", "prepare"]

_PLENTY = 8_000_000_000
_STEP_BYTES = 50_000
_KNOWN_TOKENS = 200
_TEXTS = ["the cat sat on the mat", "a dog"]
_PROMPT = [5, 6, 7, 8]
_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


class CommandFailed(Exception):  # noqa: N818 - stands for an exit code
    """A command of the command line ended with an error; `faults` says what is wrong with its end."""

    def __init__(self, code: object, out: str, err: str) -> None:
        super().__init__(err)
        self.faults: list[str] = []
        interrupted = code == 130 and err == "error: interrupted.\n"
        # A file that the user named and that cannot be read is wrong usage.
        if code not in (1, 2) and not interrupted:
            self.faults.append(f"the exit code is {code}: {err[-300:]}")
        if "Traceback" in err or len(err.splitlines()) != 1 or not err.startswith("error: "):
            self.faults.append(f"stderr is no single line of an error: {err[-600:]}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What one try may use.

    Attributes:
        models: the folder that `prepare` has filled.
        folder: an empty folder.
        notify: to be called by each callback; raises where the fault is to come.
    """

    models: Path
    folder: Path
    notify: Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """Something that a caller does.

    Attributes:
        name: of the table.
        opened: a context that gives the call, which may be made again.
        only_opening: the fault comes before the call, not in it.
        slow: it takes so long that the long form tries a part of its points.
    """

    name: str
    opened: Callable[[Place], AbstractContextManager[Callable[[], Any]]]
    only_opening: bool = False
    slow: bool = False


def prepare(folder: Path) -> Path:
    """Make the models of the operations, once."""
    models = made_once("bert", "gpt2", "vit")
    if not (folder / "ready").exists():
        shutil.copytree(models / "bert", folder / "bert")
        write_bert_tokenizer(folder / "bert")
        shutil.copytree(models / "gpt2", folder / "gpt2", ignore=shutil.ignore_patterns("int8"))
        write_gpt_tokenizer(folder / "gpt2", chat_template=_TEMPLATE)
        write_onnx(folder / "source" / "model.onnx", blocks=2)
        ids = np.arange(12, dtype=np.int64).reshape(2, 6)
        for name, array in {"input_ids": ids, "attention_mask": np.ones_like(ids)}.items():
            np.save(folder / f"{name}.npy", array)
        (folder / "ready").touch()
    return folder


@cache
def _least(directory: Path, use: Callable[[pipeload.Model], object]) -> int:
    """The smallest budget at which a use of a model works: nearly all of it is streamed."""
    budget = smallest_budget(directory)
    while True:
        try:
            with pipeload.load(directory, budget, threads=1, loaders=1) as model:
                use(model)
            return budget
        except BudgetError:
            budget += _STEP_BYTES


def _on_model(
    name: str, model: str, use: Callable[[Any, Place], Any], *, plenty: bool = False, only_opening: bool = False
) -> Operation:
    @contextmanager
    def opened(place: Place) -> Iterator[Callable[[], Any]]:
        directory = place.models / model
        idle = Place(models=place.models, folder=place.folder, notify=lambda: None)
        budget = _PLENTY if plenty else BUDGETS.get((name, directory))
        if budget is None:
            budget = BUDGETS[name, directory] = _least(directory, lambda model: use(model, idle))

        def progress(_: Progress) -> None:
            place.notify()

        with pipeload.load(directory, budget, threads=1, loaders=1, progress=progress) as loaded:
            yield lambda: use(loaded, place)

    return Operation(name=name, opened=opened, only_opening=only_opening)


BUDGETS: dict[tuple[str, Path], int] = {}


def _inputs(model: Any, seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    ids = random.integers(5, 30, (2, 6))
    made = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return {spec.name: made[spec.name] for spec in model.inputs}


def _run(model: Any, _: Place) -> Mapping[str, Any]:
    return {name: array.copy() for name, array in model.run(_inputs(model)).items()}


def _run_many(model: Any, _: Place) -> list[Any]:
    items = (_inputs(model, seed) for seed in range(3))
    return [outputs["last_hidden_state"].copy() for outputs in model.run_many(items)]


def _embed(model: Any, _: Place) -> Any:
    return model.embed(_TEXTS)


def _step(model: Any, _: Place) -> Any:
    ids = np.array([_PROMPT], np.int64)
    found = []
    with model.new_state(8) as state:
        for begin, end in ((0, 3), (3, 4)):
            inputs = {
                "input_ids": ids[:, begin:end],
                "attention_mask": np.ones((1, end), np.int64),
                "position_ids": np.arange(begin, end)[None],
            }
            given = {spec.name: inputs[spec.name] for spec in model.inputs}
            found.append(model.step(given, state).copy())
    return found


def _generate(model: Any, place: Place) -> Any:
    pieces: list[str] = []

    def streamer(piece: str) -> None:
        place.notify()
        pieces.append(piece)

    def processor(_: Any, logits: Any) -> Any:
        place.notify()
        # Tokens that the tokenizer has, so that there is text to stream.
        return np.where(np.arange(logits.shape[1]) < _KNOWN_TOKENS, logits, -np.inf).astype(np.float32)

    made = model.generate(
        _PROMPT, max_new_tokens=3, eos_token_id=[], streamer=streamer, logits_processor=[processor], do_sample=False
    )
    return [*made.token_ids], "".join(pieces)


def _chat(model: Any, _: Place) -> Any:
    with model.session() as session:
        prompt = model.chat_prompt([{"role": "user", "content": "the cat"}])
        return [*session.generate(prompt, max_new_tokens=2, eos_token_id=[]).token_ids]


def _content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _making(name: str, make: Callable[[Place, Path, Callable[..., None]], Any]) -> Operation:
    """An operation that makes a folder, whole or not at all."""
    made: list[dict[str, str]] = []

    @contextmanager
    def opened(place: Place) -> Iterator[Callable[[], Any]]:
        target = place.folder / "made" / "target"
        target.parent.mkdir()

        def call() -> Any:
            try:
                make(place, target, lambda *_: place.notify())
            except KeyboardInterrupt:
                _check_whole(target, made)
                raise
            made.append(_taken(target))
            return made[-1]

        yield call
        if found := sorted(path.name for path in target.parent.iterdir()):
            raise AssertionError(f"left behind beside the target: {found}")

    return Operation(name=name, opened=opened, slow=True)


def _taken(target: Path) -> dict[str, str]:
    content = _content(target)
    shutil.rmtree(target)
    return content


def _check_whole(target: Path, made: list[dict[str, str]]) -> None:
    """An interrupt may come when the target is in its place already."""
    if target.exists() and _taken(target) not in made:
        raise AssertionError("the target of an interrupted call is not whole")


def _export(place: Place, target: Path, progress: Callable[..., None]) -> None:
    export(place.models / "source" / "model.onnx", target, progress=progress)


def _convert(place: Place, target: Path, progress: Callable[..., None]) -> None:
    convert(place.models / "bert", target, weights="int8", progress=progress)


def _command(name: str, *arguments: str, makes: bool = False) -> Operation:
    made: list[dict[str, str]] = []

    @contextmanager
    def opened(place: Place) -> Iterator[Callable[[], Any]]:
        target = place.folder / "made"

        def call() -> Any:
            values = [one.format(models=place.models, made=target) for one in arguments]
            out, err = io.StringIO(), io.StringIO()
            code: object = 0
            with (
                mock.patch.object(signal, "signal"),
                mock.patch.object(sys, "argv", ["pipeload", *values]),
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
            ):
                try:
                    pipeload.cli.main()
                except SystemExit as end:
                    code = end.code or 0
            if code:
                if code == INTERRUPTED:
                    _check_whole(target, made)
                raise CommandFailed(code, out.getvalue(), err.getvalue())
            if makes:
                made.append(_taken(target))
                return made[-1]
            return [line for line in out.getvalue().splitlines() if not line.startswith("pass ")]

        yield call
        if target.exists():
            raise AssertionError("left behind: the target")

    return Operation(name=name, opened=opened, slow=True)


_ARRAYS = ("--input", "input_ids={models}/input_ids.npy", "--input", "attention_mask={models}/attention_mask.npy")

OPERATIONS: Mapping[str, Operation] = {
    one.name: one
    for one in (
        _on_model("load", "bert", _run, only_opening=True),
        _on_model("run", "bert", _run),
        _on_model("run-resident", "bert", _run, plenty=True),
        _on_model("run_many", "bert", _run_many),
        _on_model("embed", "bert", _embed),
        _on_model("step", "gpt2", _step),
        _on_model("generate", "gpt2", _generate),
        _on_model("chat", "gpt2", _chat),
        _making("export", _export),
        _making("convert", _convert),
        _command("cli-run", "run", "{models}/bert", *_ARRAYS, "--random", "--budget", "8GB"),
        _command("cli-embed", "embed", "{models}/bert", "the cat", "--budget", "8GB"),
        _command("cli-generate", "generate", "{models}/gpt2", "the cat", "--max-new-tokens", "2", "--budget", "8GB"),
        _command("cli-export", "export", "{models}/source/model.onnx", "{made}", makes=True),
        _command("cli-convert", "convert", "{models}/bert", "{made}", "--weights", "int8", makes=True),
    )
}
