"""A scheduler and three nodes of unequal budgets, as processes on loopback."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.engine.cluster.processes import Cluster
from tests.engine.harness import EMULATED
from tests.engine.serve.conftest import TEMPLATE, with_words
from tests.engine.tasks.fakes import write_bert_tokenizer
from tests.models import REFERENCE_NAME, made_once

import pipeload
from pipeload.format import manifest as manifests
from pipeload.format.manifest import FileRecord

if TYPE_CHECKING:
    from pipeload.cluster.connection import Connection

MODELS = ("bert", "vit", "gpt2", "llama")
CHAT, EMBEDDER = "chat", "embedder"
"""Llama and BERT with tokenizers."""
_PROCESSES = {"cluster", "models"}
BUDGETS = {"small": "330MB", "middle": "400MB", "large": "500MB"}

if EMULATED or find_spec("distributed") is None:
    # Subprocesses do not work under qemu, and the extra is not needed for all else.
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker of a test run has the cluster; tests with processes are slow."""
    for item in items:
        if Path(__file__).parent in item.path.parents and _PROCESSES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group("cluster"))
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A node's directory of models."""
    folder = tmp_path_factory.mktemp("models")
    given = os.environ.get("PIPELOAD_TEST_MODELS")
    source = Path(given) if given else made_once(*MODELS)
    for name in MODELS:
        (folder / name).symlink_to(source / name)
    _list_files(with_words(Path(shutil.copytree(source / "llama", folder / CHAT)), chat_template=TEMPLATE))
    embedder = Path(shutil.copytree(source / "bert", folder / EMBEDDER))
    write_bert_tokenizer(embedder)
    _list_files(embedder)
    return folder


def _list_files(directory: Path) -> None:
    """Add the files of a directory to its manifest, as an export does: clients get no others."""
    manifest = manifests.read(directory)
    known = {record.path for record in manifest.files} | {REFERENCE_NAME, manifests.MANIFEST_NAME}
    added = [
        FileRecord(path=path.name, nbytes=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(directory.iterdir())
        if path.suffix == ".json" and path.name not in known
    ]
    manifests.write(replace(manifest, files=(*manifest.files, *added)), directory)


@pytest.fixture(scope="session")
def processes(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A scheduler, and nodes once a test needs them."""
    with Cluster(models, tmp_path_factory.mktemp("cluster")) as made:
        yield made


@pytest.fixture
def cluster(processes: Cluster) -> Cluster:
    """A cluster whose nodes all run, also where the test before has ended some: starting one takes seconds."""
    processes.start(BUDGETS)
    return processes


@pytest.fixture
def connection(cluster: Cluster) -> Iterator[Connection]:
    with pipeload.connect(cluster.address) as found:
        yield found
