"""The settings of the process that all tests need."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from itertools import count
from pkgutil import walk_packages

import pytest

# Before anything imports onnxruntime, whose telemetry opens sockets at moments of its own.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from tests.models import SIBLINGS

# A shell that starts the tests in the background has them ignore Ctrl-C, and every program that they start inherits it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Each of torch's threads keeps a core busy while it waits for work, and a tiny model has none for a second one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_NUMBERS = count()
_SLOW_NAMES = SIBLINGS | {"bert-answers", "bert-masked", "gptj", "gptneo"}
"""Siblings under the names of the engine's tests and of the exporter's."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests over several architectures are slow with the siblings of the first ones."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec and any(isinstance(value, str) and value in _SLOW_NAMES for value in callspec.params.values()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def all_modules() -> None:
    """A module that is imported while a test has replaced something would keep the replacement for all later tests."""
    for name in ("pipeload", "pipeload_export"):
        if find_spec(name):
            for module in walk_packages(import_module(name).__path__, f"{name}."):
                with suppress(ImportError):  # of an extra that is not installed
                    import_module(module.name)


@pytest.fixture(scope="session", autouse=True)
def users_cache_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fixtures of a whole session must not write into the user's own cache either."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIPELOAD_CACHE", str(tmp_path_factory.getbasetemp() / "caches" / "session"))
        yield


@pytest.fixture(autouse=True)
def users_cache(
    users_cache_of_the_session: None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty cache for each test: none writes into the user's own, and none finds files of another one."""
    folder = tmp_path_factory.getbasetemp() / "caches" / str(next(_NUMBERS))
    monkeypatch.setenv("PIPELOAD_CACHE", str(folder))
