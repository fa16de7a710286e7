"""A node takes each byte once, from the first node that gives it, and never keeps a wrong one."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
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
        has: paths of the files that it has; None for all.

    Attributes:
        asked: (path, offset) of the pieces that it has sent.
        damaged: it sends zeros.
        lost: paths of files that it has lost since it was asked for its files.
    """

    def __init__(
        self,
        directory: Path,
        most: int = 10**9,
        failure: Exception | None = None,
        has: Collection[str] | None = None,
    ) -> None:
        self._directory, self._most, self._failure = directory, most, failure
        self._files = ModelFiles(directory, manifests.read(directory))
        self.asked: list[tuple[str, int]] = []
        self.silent = self.damaged = self.tells_nothing = False
        self.lost: set[str] = set()
        self._has = has

    async def pipeload_manifest(self, sha256: str) -> bytes:
        return (self._directory / MANIFEST_NAME).read_bytes()

    async def pipeload_files(self, sha256: str) -> list[str]:
        if self.tells_nothing:
            await asyncio.Event().wait()
        return [one.sha256 for path, one in self._files.records.items() if self._has is None or path in self._has]

    async def pipeload_piece(self, sha256: str, path: str, offset: int, nbytes: int) -> bytes:
        if self.silent:
            await asyncio.Event().wait()
        if path in self.lost:
            raise pipeload.ShardError(f"'{path}' cannot be read: No such file or directory.")
        assert self._has is None or path in self._has, "it never said that it has this file"
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
        await fetcher.bring(sha256_of(toy), "toy", lambda whole: whole, [*known], ())
        assert fetcher.store.names == {sha256_of(toy): "toy"}

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
    assert sorted(failing.asked + other.asked) == sorted(_pieces(toy))


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
    assert sorted(failing.asked + back.asked) == sorted(_pieces(toy))
    # And what is there is not asked for again.
    _bring(tmp_path, toy, _Source(toy, most=0))


def test_wrong_bytes_are_not_kept(toy: Path, tmp_path: Path) -> None:
    lying, other = _Source(toy), _Source(toy)
    lying.damaged = True
    _bring(tmp_path, toy, lying, other)
    assert _is_whole(tmp_path, toy)
    assert sorted(other.asked) == sorted(_pieces(toy))
    # A node that has sent a wrong file is asked for no other one.
    assert len({path for path, _ in lying.asked}) <= 1


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


def _halves(toy: Path) -> tuple[list[str], list[str]]:
    paths = [one.path for one in manifests.read(toy).files]
    return paths[::2], paths[1::2]


def test_two_nodes_with_a_half_each_give_the_whole(toy: Path, tmp_path: Path) -> None:
    """No node has all of the model any more."""
    one, other = (_Source(toy, has=half) for half in _halves(toy))
    _bring(tmp_path, toy, one, other)
    assert _is_whole(tmp_path, toy)
    assert sorted(one.asked + other.asked) == sorted(_pieces(toy))


def test_a_file_that_no_node_has_is_named_and_the_others_are_kept(toy: Path, tmp_path: Path) -> None:
    half, rest = _halves(toy)
    with pytest.raises(pipeload.ClusterError, match="None of the nodes that answer has it"):
        _bring(tmp_path, toy, _Source(toy, has=[*half, *rest[1:]]))
    last = _Source(toy, has=rest)
    _bring(tmp_path, toy, _Source(toy, has=half), last)
    assert _is_whole(tmp_path, toy)
    assert {path for path, _ in last.asked} >= {rest[0]}


def test_the_load_of_sending_spreads(toy_large: Path, tmp_path: Path) -> None:
    """Each of several nodes sends its share, but for the size of a file."""
    sources = [_Source(toy_large) for _ in range(3)]
    _bring(tmp_path, toy_large, *sources)
    largest = max(one.nbytes for one in manifests.read(toy_large).files)
    sent = [_PIECE * len(source.asked) for source in sources]
    assert max(sent) - min(sent) <= 2 * largest
    assert sum(len(source.asked) for source in sources) == len(_pieces(toy_large))


def test_a_node_that_has_lost_a_file_is_left_for_another(toy: Path, tmp_path: Path) -> None:
    losing, other = _Source(toy), _Source(toy)
    losing.lost = {one.path for one in manifests.read(toy).files}
    _bring(tmp_path, toy, losing, other)
    assert _is_whole(tmp_path, toy)
    assert losing.asked == []


def test_what_a_lying_node_has_begun_is_taken_anew_from_the_one_that_goes_on(toy: Path, tmp_path: Path) -> None:
    """The other one is not blamed for it, also where it is the only one that is left."""
    lying = _Source(toy, most=1)
    lying.damaged = True
    with pytest.raises(pipeload.ClusterError):
        _bring(tmp_path, toy, lying)
    _bring(tmp_path, toy, _Source(toy))
    assert _is_whole(tmp_path, toy)


def test_a_node_that_does_not_tell_what_it_has_is_waited_for_once(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_LIST_S", 0.01)
    mute, other = _Source(toy), _Source(toy)
    mute.tells_nothing = True
    _bring(tmp_path, toy, mute, other)
    assert _is_whole(tmp_path, toy)
    assert mute.asked == []


def test_nodes_that_fetch_at_the_same_time_have_files_of_each_other(toy: Path, tmp_path: Path) -> None:
    """What has just come to one node is there for the next one that asks."""
    half, rest = _halves(toy)
    growing, owner = _Source(toy, has=(come := set(half))), _Source(toy, has=rest)
    piece = owner.pipeload_piece

    async def moving(sha256: str, path: str, offset: int, nbytes: int) -> bytes:
        # The other node has got the rest, too, and this one has gone.
        come.update(rest)
        owner.lost = {*rest} - {path}
        return await piece(sha256, path, offset, nbytes)

    owner.pipeload_piece = moving  # type: ignore[method-assign]
    _bring(tmp_path, toy, growing, owner)
    assert _is_whole(tmp_path, toy)
