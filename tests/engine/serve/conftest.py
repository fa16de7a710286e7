"""Tiny models with tokenizers of their own, as a server has them."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from tests.engine.harness import Gate
from tests.engine.tasks.fakes import WORDS, write_bert_tokenizer, write_gpt_tokenizer, write_json

from pipeload.pipeline.sweep import Sweep


def _missing() -> list[str]:
    """Packages of the extra `serve` that are not installed."""
    found = []
    for name in ("starlette", "uvicorn", "prometheus_client", "tokenizers", "jinja2"):
        try:
            import_module(name)
        except ImportError:
            found.append(name)
    return found


collect_ignore_glob = ["test_*.py"] if _missing() else []

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def with_words(directory: Path, **settings: object) -> Path:
    """A tokenizer whose tokens all have a text, for models with a vocabulary of 1000."""
    from tokenizers import Tokenizer

    write_gpt_tokenizer(directory, **settings)
    path = str(directory / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.add_tokens([f" w{number}" for number in range(tokenizer.get_vocab_size(), 1000)])
    tokenizer.save(path)
    write_json(directory, "generation_config.json", {"eos_token_id": 0})
    return directory


@pytest.fixture(scope="session")
def chat_model(exported_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a chat template."""
    directory = Path(shutil.copytree(exported_llama, tmp_path_factory.mktemp("chat") / "chat"))
    return with_words(directory, chat_template=TEMPLATE)


@pytest.fixture(scope="session")
def embedder(made_toys: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy that embeds texts."""
    directory = Path(shutil.copytree(made_toys("toy"), tmp_path_factory.mktemp("embedder") / "embedder"))
    write_bert_tokenizer(directory)
    write_json(directory, "config.json", {"vocab_size": len(WORDS)})
    return directory


class Sweeps:
    """Counts sweeps of all models; each may stop at a gate before its first shard."""

    def __init__(self) -> None:
        self.count = 0
        self.feeds: list[int] = []
        self.gates: dict[int, Gate] = {}
        self._changed = threading.Condition()

    def stop_at(self, number: int) -> Gate:
        """The sweep of this number stops at the gate."""
        self.gates[number] = Gate()
        return self.gates[number]

    def begin(self, feeds: int) -> None:
        with self._changed:
            self.count += 1
            self.feeds.append(feeds)
            gate = self.gates.get(self.count)
            self._changed.notify_all()
        if gate is not None:
            gate.stop_here()


@contextmanager
def counted_sweeps(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sweeps]:
    """Counts all sweeps; when it ends, the gates are open."""
    made, run = Sweeps(), Sweep.run

    def counted(self: Sweep, feeds: Any, *arguments: Any, **options: Any) -> None:
        made.begin(len(feeds))
        run(self, feeds, *arguments, **options)

    monkeypatch.setattr(Sweep, "run", counted)
    try:
        yield made
    finally:
        for gate in made.gates.values():
            gate.open()


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sweeps]:
    with counted_sweeps(monkeypatch) as made:
        yield made
