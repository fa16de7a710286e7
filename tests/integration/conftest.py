"""Tiny models that several of these tests serve."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.engine.tasks.fakes import WORDS, write_bert_tokenizer, write_json
from tests.models import made_once


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories of a tiny chat model and a tiny embedder."""
    for package in ("torch", "transformers", "uvicorn"):
        pytest.importorskip(package)
    from tests.engine.serve.conftest import TEMPLATE, with_words

    made = made_once("llama", "bert")
    folder = tmp_path_factory.mktemp("served")
    with_words(Path(shutil.copytree(made / "llama", folder / "chat")), chat_template=TEMPLATE)
    embedder = Path(shutil.copytree(made / "bert", folder / "embedder"))
    write_bert_tokenizer(embedder)
    write_json(embedder, "config.json", {"vocab_size": len(WORDS)})
    return folder
