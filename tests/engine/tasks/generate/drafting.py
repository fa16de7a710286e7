"""Shared by the tests of drafts and sessions: texts that repeat themselves, tokenizers, and comparisons."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.engine.harness import smallest_budget
from tests.engine.tasks.fakes import write_json

import pipeload

Processor = Callable[[NDArray[np.int64], NDArray[np.float32]], NDArray[np.float32]]

CYCLE = (5, 6, 7, 8, 9, 10)
PROMPT = [*CYCLE] * 3
"""Repeats itself, so that there is something to draft from the first token on."""

_ROOM_BYTES = 6_000_000
"""For the caches of the tiny models."""


def load(directory: Path, room_bytes: int = _ROOM_BYTES) -> pipeload.Model:
    return pipeload.load(directory, smallest_budget(directory) + room_bytes, threads=1)


def steered(strength: float = 9.0, cycle: Sequence[int] = CYCLE) -> Processor:
    """Makes that token of the cycle likely which follows the last token: by far when greedy, mostly when sampled."""
    following = dict(zip(cycle, [*cycle[1:], cycle[0]], strict=True))

    def process(token_ids: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        # The toy's logits grow with the text. Those of banned tokens are minus infinity.
        logits /= max(1.0, float(logits[np.isfinite(logits)].std()))
        logits[0, following.get(int(token_ids[0, -1]), cycle[0])] += np.float32(strength)
        return logits

    return process


class Recorder:
    """A logits processor that changes nothing and remembers the texts that it was called with."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, token_ids: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        self.seen.append(tuple(token_ids[0].tolist()))
        return logits


class Failing:
    """A streamer or logits processor that raises at its n-th call."""

    def __init__(self, error: BaseException, calls: int) -> None:
        self._error, self._left = error, calls

    def __call__(self, *arguments: Any) -> Any:
        self._left -= 1
        if self._left == 0:
            raise self._error
        return arguments[-1]


def assert_same(made: pipeload.Generation, plain: pipeload.Generation, about: object = "") -> None:
    """The same in everything that does not tell how it was made."""
    assert made.token_ids == plain.token_ids, about
    assert made.text == plain.text, about
    assert made.finish_reason == plain.finish_reason, about
    assert made.prompt_tokens == plain.prompt_tokens, about
    assert (made.logprobs is None) == (plain.logprobs is None), about
    if plain.logprobs is not None:
        assert made.logprobs == pytest.approx(plain.logprobs, abs=1e-4), about


def assert_counted(made: pipeload.Generation, about: object = "") -> None:
    """Each sweep gives one token, and those that it accepts; the last one may end the text with one of these."""
    assert 0 <= made.accepted_tokens <= made.drafted_tokens, about
    assert made.sweeps + made.accepted_tokens - len(made.token_ids) in (0, 1), about


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many new tokens each step had."""
    lengths: list[int] = []
    for name in ("step", "step_top"):
        step = getattr(pipeload.Model, name)

        def counting(model: Any, inputs: Any, *arguments: Any, step: Any = step, **options: Any) -> Any:
            lengths.append(inputs["input_ids"].shape[1])
            return step(model, inputs, *arguments, **options)

        monkeypatch.setattr(pipeload.Model, name, counting)
    return lengths


def with_letters(source: Path, target: Path) -> Path:
    """A copy of a model with a vocabulary of 96, each of whose tokens is a character; the last one is special."""
    tokenizers = pytest.importorskip("tokenizers")
    shutil.copytree(source, target)
    letters = {chr(32 + id_): id_ for id_ in range(95)} | {"<|end|>": 95}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(target / "tokenizer.json"))
    write_json(target, "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
    return target


def with_bytes(source: Path, target: Path) -> Path:
    """A copy of a model with a vocabulary of 1000, whose tokens are bytes and pairs of letters; the last is special."""
    tokenizers = pytest.importorskip("tokenizers")
    shutil.copytree(source, target)
    level = tokenizers.pre_tokenizers.ByteLevel
    small = "abcdefghijklmnopqrstuvwxyz"
    pairs = [(one, two) for one in "Ġ" + small for two in small + small.upper()]
    pairs = pairs[: 1000 - 256 - 1]
    tokens = [*sorted(level.alphabet()), *(one + two for one, two in pairs), "<|end|>"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({token: id_ for id_, token in enumerate(tokens)}, pairs))
    tokenizer.pre_tokenizer = level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(target / "tokenizer.json"))
    write_json(target, "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
    return target
