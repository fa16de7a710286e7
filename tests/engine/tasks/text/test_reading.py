"""Memory for reading texts: known before the library takes it, asked for under the model's budget, and given back."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.engine.harness import PATIENCE_S, run_python
from tests.engine.tasks.fakes import ToyRunner, manifest, write_bert_tokenizer, write_gpt_tokenizer

from pipeload.errors import BudgetError, ConfigError, ShardError
from pipeload.tasks.text.batches import in_windows
from pipeload.tasks.text.reading import reading_bytes
from pipeload.tasks.text.tokenizer import Tokenizer, tokenizer_of

pytest.importorskip("tokenizers")

_LONG = "the cat sat on the mat " * 2000

_TEXTS = {
    "words": "the cat sat on mats ",
    "marks": ".,",
    "digits": "3141592653589793",
    "one word": "a",
    "spaces": " ",
    "lines": "a\n",
    "ideographs": "日本語",
    "expanded": "\N{ARABIC LIGATURE SALLALLAHOU ALAYHE WASALLAM}",
    "emoji": "🦜",
    "accents": "é è ",
    "special": "[MASK]",
}

_BEGIN = """
import json, random, sys
from pathlib import Path
from tests.engine.tasks.fakes import ToyRunner, manifest
from pipeload.machine.heap import trim
from pipeload.machine.memory import peak_rss_bytes, reset_peak_rss, rss_bytes
from pipeload.tasks.text.reading import FREE_BYTES, reading_bytes
from pipeload.tasks.text.tokenizer import tokenizer_of

runner = ToyRunner(Path(sys.argv[1]), manifest("feature-extraction"), dict)
tokenizer = tokenizer_of(runner)
"""
_TEXTS_ONE_BY_ONE = """
for text in json.load(sys.stdin):
    needed_bytes = reading_bytes(text, tokenizer._tokens)
    trim()
    if not reset_peak_rss():
        break
    before_bytes = rss_bytes()
    tokenizer.encode(text)
    print(needed_bytes, peak_rss_bytes() - before_bytes - FREE_BYTES)
"""
_WORDS = """
random.seed(0)
for words in (200, 4000):
    for _ in range(words):
        tokenizer.encode("".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=250)))
    trim()
    print(rss_bytes())
"""


def _child(program: str, directory: Path, given: str = "") -> list[str]:
    """The lines that a program of its own prints, whose memory is measured."""
    return run_python(_BEGIN + program, directory, given=given, traced=False).stdout.splitlines()


def _tokenizer(directory: Path, **settings: Any) -> tuple[ToyRunner, Tokenizer]:
    write_bert_tokenizer(directory, **settings)
    runner = ToyRunner(directory, manifest("feature-extraction"), dict)
    return runner, tokenizer_of(runner)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's count of a peak from now on")
@pytest.mark.parametrize("write", [write_bert_tokenizer, write_gpt_tokenizer])
@pytest.mark.parametrize("limit", [10**9, 16], ids=["whole", "cut"])
def test_the_library_takes_no_more_than_is_counted(tmp_path: Path, write: Any, limit: int) -> None:
    write(tmp_path, model_max_length=limit)
    texts = [part * (size // len(part.encode())) for part in _TEXTS.values() for size in (20_000, 140_000)]
    found = [tuple(map(int, line.split())) for line in _child(_TEXTS_ONE_BY_ONE, tmp_path, json.dumps(texts))]
    if not found:
        pytest.skip("this system counts no peak from now on")
    assert len(found) == len(texts)
    for text, (needed_bytes, taken_bytes) in zip(texts, found, strict=True):
        assert taken_bytes <= needed_bytes, (text[:6], len(text))


def test_a_short_text_asks_for_nothing(tmp_path: Path) -> None:
    runner, tokenizer = _tokenizer(tmp_path)
    for text in ("the cat", "." * 1000, "日本" * 100, "the cat sat " * 200):
        tokenizer.encode(text)
        tokenizer.windows("the cat", text, long=1, length=16, overlap=4)
    assert runner.rooms == []


def test_room_is_there_while_the_library_reads_and_is_given_back(tmp_path: Path) -> None:
    runner, tokenizer = _tokenizer(tmp_path)
    held: list[list[int]] = []

    class Watching:
        def __init__(self, backend: Any) -> None:
            self._backend = backend

        def __getattr__(self, name: str) -> Any:
            return getattr(self._backend, name)

        def encode(self, *texts: str, **options: Any) -> Any:
            if max(map(len, texts)) > 1000:
                held.append([*runner.rooms])
            return self._backend.encode(*texts, **options)

    needed_bytes = reading_bytes(_LONG, tokenizer._tokens)
    assert needed_bytes > 100 * len(_LONG)
    tokenizer._backend = Watching(tokenizer._backend)
    tokenizer.encode(_LONG)
    tokenizer.encode("the cat", _LONG)
    tokenizer.windows("the cat", _LONG, long=1, length=16, overlap=4)
    assert held == [[needed_bytes], [0, needed_bytes], [0, 0, needed_bytes]]
    assert runner.rooms == [0, 0, 0]


def test_long_texts_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget that has room for each of them refuses none because of another one, of this model or the next."""
    _, tokenizer = _tokenizer(tmp_path)
    (tmp_path / "other").mkdir()
    other_runner, other = _tokenizer(tmp_path / "other")
    inside, other_has_room = threading.Event(), threading.Event()
    together: list[bool] = []

    class Waiting:
        def encode(self, text: str, **options: Any) -> Any:
            if len(text) > 1000:
                inside.set()
                # Its room would come at once.
                together.append(other_has_room.wait(0.3))
            return backend.encode(text, **options)

    @contextmanager
    def room_for(most_bytes: int) -> Iterator[None]:
        other_has_room.set()
        yield

    backend, tokenizer._backend = tokenizer._backend, Waiting()
    monkeypatch.setattr(other_runner, "room_for", room_for)
    first = threading.Thread(target=tokenizer.encode, args=(_LONG,))
    first.start()
    assert inside.wait(PATIENCE_S)
    assert other.encode(_LONG).ids
    first.join(PATIENCE_S)
    assert together == [False]
    assert other_has_room.is_set()


def test_a_text_without_room_is_refused_before_the_library_gets_it(tmp_path: Path) -> None:
    runner, tokenizer = _tokenizer(tmp_path)
    runner.largest_room = 1_000_000
    with pytest.raises(
        BudgetError, match=rf"A text of {len(_LONG)} characters takes up to .* MB to read: split it.*too"
    ):
        tokenizer.encode(_LONG)
    assert tokenizer.encode("the cat").ids


def test_a_library_that_fails_gives_the_room_back(tmp_path: Path) -> None:
    runner, tokenizer = _tokenizer(tmp_path)

    class Failing:
        def encode(self, text: str, **options: Any) -> Any:
            if len(text) > 1000:
                raise OSError("no")
            return backend.encode(text, **options)

    backend, tokenizer._backend = tokenizer._backend, Failing()
    with pytest.raises(ShardError, match="cannot turn a text into tokens"):
        tokenizer.encode(_LONG)
    assert runner.rooms == [0]
    tokenizer._backend = backend
    assert tokenizer.encode("the cat").ids, "the next text has its turn"


def test_one_text_is_read_at_a_time(tmp_path: Path) -> None:
    _, tokenizer = _tokenizer(tmp_path)
    locked: list[bool] = []

    class Watching:
        def encode(self, *texts: str, **options: Any) -> Any:
            locked.append(tokenizer._reading.locked())
            return backend.encode(*texts, **options)

    backend, tokenizer._backend = tokenizer._backend, Watching()
    tokenizer.encode("the cat")
    tokenizer.encode(_LONG)
    assert len(locked) > 100
    assert all(locked)
    assert not tokenizer._reading.locked()


def test_a_text_beyond_the_most_characters_is_refused(tmp_path: Path) -> None:
    runner, tokenizer = _tokenizer(tmp_path)
    tokenizer.most_characters = 8
    assert tokenizer.encode("the cats").ids
    for texts in (("the catss",), ("the cat", "the catss")):
        with pytest.raises(ConfigError, match=r"A text has 9 characters, and at most 8 are taken\. Split it\."):
            tokenizer.encode(*texts)
    assert runner.rooms == []


def test_the_tokens_of_many_long_texts_are_not_in_memory_together() -> None:
    windows: list[int] = []

    def made(texts: Any) -> list[Any]:
        windows.append(len(texts))
        return [*texts]

    texts: list[Any] = ["a" * 100_000] * 5 + [("a" * 100_000, "b" * 100_000)] * 2 + ["a" * 10**6, [1] * 10**6, "a"]
    assert in_windows(texts, made) == texts
    assert windows == [2, 2, 1, 1, 1, 1, 2]
    assert in_windows([], made) == []


def test_tokens_take_little_memory(tmp_path: Path) -> None:
    _, tokenizer = _tokenizer(tmp_path, model_max_length=10**9)
    row = tokenizer.encode(_LONG)
    assert len(row.ids) > 12_000
    arrays = (row.ids, row.type_ids, row.special, row.begins, row.ends)
    assert sum(sys.getsizeof(one) for one in arrays) <= 30 * len(row.ids)
    assert _LONG[row.begins[2] : row.ends[2]] == "cat"


def test_the_library_keeps_few_words(tmp_path: Path) -> None:
    """It keeps the tokens of the last 10,000 words otherwise, which are 80 MB where each is long and another one."""
    write_gpt_tokenizer(tmp_path)
    before_bytes, after_bytes = map(int, _child(_WORDS, tmp_path))
    assert after_bytes <= before_bytes + 4_000_000
