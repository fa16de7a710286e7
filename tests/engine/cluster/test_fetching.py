"""A node takes each byte once, from the first node that gives it, and never keeps a wrong one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.engine.cluster.test_store import sha256_of

import pipeload
from pipeload.cluster import fetching
from pipeload.cluster.fetching import Fetcher
from pipeload.cluster.store import Store
from pipeload.format import manifest as manifests
from pipeload.format.manifest import MANIFEST_NAME
from pipeload.storage.model_files import ModelFiles

_PIECE = 10_000


class _Source:
    """A node that has a model.

    Args:
        directory: of the model.
        most: it sends this many pieces, and then fails with `failure`.

    Attributes:
        asked: (path, offset) of the pieces that it has sent.
    """

    def __init__(self, directory: Path, most: int = 10**9, failure: Exception | None = None) -> None:
        self._directory, self._most, self._failure = directory, most, failure
        self._files = ModelFiles(directory, manifests.read(directory))
        self.asked: list[tuple[str, int]] = []
        self.silent = self.damaged = False

    async def pipeload_manifest(self, sha256: str) -> bytes:
        return (self._directory / MANIFEST_NAME).read_bytes()

    async def pipeload_piece(self, sha256: str, path: str, offset: int, nbytes: int) -> bytes:
        if self.silent:
            await asyncio.Event().wait()
        if len(self.asked) >= self._most:
            raise self._failure or OSError("cut off")
        self.asked.append((path, offset))
        piece = self._files.piece(path, offset, nbytes)
        return bytes(len(piece)) if self.damaged else piece


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "PIECE_BYTES", _PIECE)


def _bring(folder: Path, toy: Path, *sources: _Source) -> None:
    async def main() -> None:
        known = {str(number): source for number, source in enumerate(sources)}
        fetcher = Fetcher(Store(folder, 100_000_000))
        fetcher.pool = known.__getitem__
        await fetcher.bring(sha256_of(toy), lambda whole: whole, [*known], ())

    asyncio.run(main())


def _is_whole(folder: Path, toy: Path) -> bool:
    there = folder / sha256_of(toy)
    records = manifests.read(toy).files
    return all((there / one.path).read_bytes() == (toy / one.path).read_bytes() for one in records)


def _pieces(toy: Path) -> list[tuple[str, int]]:
    return [(one.path, begin) for one in manifests.read(toy).files for begin in range(0, one.nbytes, _PIECE)]


def test_another_node_goes_on_where_one_has_failed(toy: Path, tmp_path: Path) -> None:
    failing, other = _Source(toy, most=3), _Source(toy)
    _bring(tmp_path, toy, failing, other)
    assert _is_whole(tmp_path, toy)
    assert failing.asked + other.asked == _pieces(toy)


@pytest.mark.parametrize(
    "failure",
    [OSError("cut off"), pipeload.ShardError("it is damaged there"), pipeload.LoadError("its disk"), KeyError("op")],
)
def test_another_try_goes_on_where_all_have_failed(toy: Path, tmp_path: Path, failure: Exception) -> None:
    failing, back = _Source(toy, most=3, failure=failure), _Source(toy)
    with pytest.raises(pipeload.ClusterError, match="could not be fetched"):
        _bring(tmp_path, toy, failing)
    _bring(tmp_path, toy, back)
    assert _is_whole(tmp_path, toy)
    assert failing.asked + back.asked == _pieces(toy)
    # And what is there is not asked for again.
    _bring(tmp_path, toy, _Source(toy, most=0))


def test_wrong_bytes_are_not_kept(toy: Path, tmp_path: Path) -> None:
    lying, other = _Source(toy), _Source(toy)
    lying.damaged = True
    _bring(tmp_path, toy, lying, other)
    assert _is_whole(tmp_path, toy)
    assert other.asked == _pieces(toy)


def test_a_node_that_is_silent_is_given_up(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_ANSWER_S", 0.01)
    silent = _Source(toy)
    silent.silent = True
    with pytest.raises(pipeload.ClusterError, match="It sends nothing"):
        _bring(tmp_path, toy, silent)


def test_a_manifest_of_another_model_is_not_taken(toy: Path, toy_large: Path, tmp_path: Path) -> None:
    other = _Source(toy_large)
    with pytest.raises(pipeload.ClusterError, match="sends another manifest"):
        _bring(tmp_path, toy, other)
    assert [*tmp_path.iterdir()] == []


def test_only_listed_files_are_given(toy_copy: Path) -> None:
    (toy_copy / "secret").write_text("not of the model")
    source: Any = ModelFiles(toy_copy, manifests.read(toy_copy))
    for name in ("secret", "../secret", MANIFEST_NAME):
        with pytest.raises(pipeload.ShardError, match="lists no file"):
            source.piece(name, 0, 10)
