"""One server with tiny models for all cells of the table."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from tests.engine.serve.client import settings
from tests.engine.serve.conftest import TEMPLATE, with_words
from tests.engine.tasks.fakes import WORDS, write_bert_tokenizer, write_json
from tests.models import made_once


def _missing() -> list[str]:
    """Packages that are not installed."""
    found = []
    for name in ("torch", "transformers", "uvicorn", "openai", "langchain_openai", "llguidance"):
        try:
            import_module(name)
        except ImportError:
            found.append(name)
    return found


collect_ignore_glob = ["*.py"] if _missing() else []


@pytest.fixture(scope="session")
def served_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """A chat model, an embedder, and a cross-encoder."""
    made, folder = made_once("llama", "bert", "bert-score"), tmp_path_factory.mktemp("clients")
    chat = with_words(Path(shutil.copytree(made / "llama", folder / "chat")), chat_template=TEMPLATE)
    embedder = Path(shutil.copytree(made / "bert", folder / "embedder"))
    scorer = Path(shutil.copytree(made / "bert-score", folder / "scorer"))
    write_bert_tokenizer(embedder)
    write_json(embedder, "config.json", {"vocab_size": len(WORDS)})
    write_bert_tokenizer(scorer)
    return chat, embedder, scorer


@pytest.fixture(scope="module")
def wire(served_models: tuple[Path, ...]) -> Iterator[object]:
    """The server. Tests of the engine, which may follow in this process, find none of its threads."""
    from tests.clients.wire import on_loopback

    with on_loopback(settings(*served_models, aliases={"gpt-4o-mini": "chat"})) as wire:
        yield wire
