"""Models for the engine's tests, a time limit for each of them, and no thread may outlive one."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.engine.harness import PATIENCE_S, agents
from tests.engine.still_machine import stand_still
from tests.marks import slow
from tests.models import ARCHITECTURES, TOYS, made_once, make
from tests.shared import folder_of_the_run

_GENERATORS = [name for name, (task, *_) in ARCHITECTURES.items() if task == "text-generation"]
_LARGE_TOYS = ("toy-large", "toy-large-common")
_OTHERS = [name for name in _GENERATORS if name != "llama"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents and item.get_closest_marker("timeout") is None:
            # Making models may take longer, and has a limit of its own.
            item.add_marker(pytest.mark.timeout(2 * PATIENCE_S, func_only=True))


@pytest.fixture(autouse=True)
def still_machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's measurements are fixed, but for those that the test is marked to measure."""
    measured = {what for mark in request.node.iter_markers("measures") for what in mark.args}
    assert measured <= {"memory", "times"}
    stand_still(monkeypatch, memory="memory" not in measured, times="times" not in measured)


@pytest.fixture(autouse=True)
def no_agent_survives() -> Iterator[None]:
    yield
    assert agents() == []


@pytest.fixture
def descriptors() -> Callable[[], int]:
    """How many files this process has open now."""
    return lambda: len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(scope="session")
def made_toys(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name -> a toy's directory, which no test may change."""
    given = os.environ.get("PIPELOAD_TEST_MODELS")
    folder = None if given else folder_of_the_run(tmp_path_factory) / "toys"

    def find(name: str) -> Path:
        if folder is None:
            return _given(given, name)
        if importlib.util.find_spec("onnx") is None:
            pytest.skip("needs the package onnx, or toys in PIPELOAD_TEST_MODELS")
        return make(folder, name)

    return find


@pytest.fixture(scope="session")
def toy(made_toys: Callable[[str], Path]) -> Path:
    """Six blocks of 16 kB."""
    return made_toys("toy")


@pytest.fixture(scope="session")
def toy_uneven(made_toys: Callable[[str], Path]) -> Path:
    """Six blocks of three tensors, of which only the first begins with a page."""
    return made_toys("toy-uneven")


@pytest.fixture(scope="session")
def toy_decoder(made_toys: Callable[[str], Path]) -> Path:
    """Four blocks with caches, and a tied head in two slices."""
    return made_toys("toy-decoder")


@pytest.fixture(scope="session")
def toy_large(made_toys: Callable[[str], Path]) -> Path:
    """Eight blocks of 4.2 MB, so that megabytes of budget make a difference."""
    return made_toys("toy-large")


@pytest.fixture(scope="session")
def toy_common(made_toys: Callable[[str], Path]) -> Path:
    """Six blocks with the same weights, of 16 kB."""
    return made_toys("toy-common")


@pytest.fixture(scope="session")
def toy_large_common(made_toys: Callable[[str], Path]) -> Path:
    """Eight blocks with the same weights, of 4.2 MB."""
    return made_toys("toy-large-common")


@pytest.fixture
def toy_copy(toy: Path, tmp_path: Path) -> Path:
    """A toy that the test may damage."""
    return Path(shutil.copytree(toy, tmp_path / "model"))


@pytest.fixture(params=[*sorted(TOYS.keys() - {"toy-other", *_LARGE_TOYS}), *map(slow, _LARGE_TOYS)])
def any_toy(request: pytest.FixtureRequest, made_toys: Callable[[str], Path]) -> Path:
    return made_toys(request.param)


@pytest.fixture(scope="session", params=ARCHITECTURES)
def exported(request: pytest.FixtureRequest) -> Path:
    """An architecture's directory, with `reference.npz`."""
    return _architecture(request.param)


@pytest.fixture(scope="session", params=_GENERATORS)
def exported_generator(request: pytest.FixtureRequest) -> Path:
    """The directory of an architecture that generates text, with `greedy.npz`."""
    return _architecture(request.param)


@pytest.fixture(scope="session", params=[slow("llama"), *_OTHERS, "toy-decoder"])
def decoder(request: pytest.FixtureRequest, made_toys: Callable[[str], Path]) -> Path:
    """A model with KV caches: those of architectures are written in place, those of the toy are not.

    Llama is slow beside GPT-2 here; that it generates what transformers does is tested fast, as for GPT-2.
    """
    return made_toys(request.param) if request.param in TOYS else _architecture(request.param)


@pytest.fixture(params=["exported_gpt2", "toy_decoder"])
def one_of_each(request: pytest.FixtureRequest) -> Path:
    """A model whose caches are written in place, and one whose are not."""
    return Path(request.getfixturevalue(request.param))


@pytest.fixture(scope="session")
def exported_gpt2() -> Path:
    """The directory of a tiny GPT-2, with positions for 128 tokens."""
    return _architecture("gpt2")


@pytest.fixture(scope="session")
def exported_llama() -> Path:
    """The directory of a tiny Llama."""
    return _architecture("llama")


def _architecture(name: str) -> Path:
    given = os.environ.get("PIPELOAD_TEST_MODELS")
    if given:
        return _given(given, name)
    if missing := [name for name in ("onnx", "torch", "transformers") if importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}, or {name} in PIPELOAD_TEST_MODELS")
    return made_once(name) / name


def _given(folder: str | None, name: str) -> Path:
    directory = Path(str(folder)) / name
    if not directory.is_dir():
        pytest.skip(f"PIPELOAD_TEST_MODELS has no {name}")
    return directory
