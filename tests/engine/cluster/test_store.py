"""Files that come from other nodes: whole and checked or not there, from where they stopped, within the limit."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from tests.engine.harness import assert_same
from tests.engine.model.loading import load

import pipeload
from pipeload.cluster import store as stores
from pipeload.cluster.route import shards_of, stage_places
from pipeload.cluster.store import Store, files_of
from pipeload.format import manifest as manifests
from pipeload.format.manifest import MANIFEST_NAME, Draft, FileRecord, Manifest
from pipeload.format.stages import stage
from pipeload.measuring.example_inputs import example_inputs
from pipeload.measuring.profiler import profile_dims

_MB = 1_000_000


def sha256_of(directory: Path) -> str:
    return hashlib.sha256((directory / MANIFEST_NAME).read_bytes()).hexdigest()


def fill(store: Store, directory: Path, records: list[FileRecord], piece: int = 1000) -> Path:
    """Let files come."""
    sha256, manifest = sha256_of(directory), manifests.read(directory)
    made = store.begin(sha256, "toy", (directory / MANIFEST_NAME).read_bytes())
    for record in records:
        data = (directory / record.path).read_bytes()
        incoming = store.incoming(sha256, manifest, record)
        while incoming.left:
            incoming.add(data[incoming.position : incoming.position + piece])
        incoming.finish()
    return made


def _stages(manifest: Manifest) -> list[Manifest]:
    places = [0, *stage_places(manifest), len(manifest.shards)]
    return [stage(manifest, begin, end) for begin, end in pairwise(places)]


def test_the_files_of_all_stages_are_those_of_the_model(exported: Path) -> None:
    manifest = manifests.read(exported)
    stages = [files_of(own, manifest) for own in _stages(manifest)]
    assert {record.path for own in stages for record in own} == {record.path for record in manifest.files}
    weights = [{record.path for record in own if record.path.endswith(".safetensors")} for own in stages]
    assert all(len(own) < len(set.union(*weights)) for own in weights)


def test_a_models_own_draft_is_not_fetched(toy: Path) -> None:
    manifest = manifests.read(toy)
    guesses = FileRecord(path="draft/shards/block.000.onnx", nbytes=1, sha256="0" * 64)
    settings = FileRecord(path="config.json", nbytes=1, sha256="0" * 64)
    whole = replace(manifest, files=(*manifest.files, guesses, settings), draft=Draft(path="draft", nbytes=1))
    for own in _stages(manifest):
        found = files_of(own, whole)
        assert guesses not in found
        assert settings in found


def test_a_stage_runs_on_its_own_files_alone(exported: Path, tmp_path: Path) -> None:
    manifest = manifests.read(exported)
    cut = stage_places(manifest)[0]
    shards = shards_of(manifest, 0, cut)
    there = fill(Store(tmp_path / "store", 100 * _MB), exported, files_of(stage(manifest, 0, cut), manifest), 1 << 20)
    inputs = example_inputs(stage(manifest, 0, cut), profile_dims(manifest) | {"past_sequence_length": 16})
    with load(exported, shards=shards) as whole, load(there, shards=shards) as own:
        assert_same(own.run(inputs), whole.run(inputs))
    assert len([*(there / "shards").iterdir()]) < len([*(exported / "shards").iterdir()])


@pytest.fixture
def record(toy: Path) -> FileRecord:
    """The largest file of the toy."""
    return max(manifests.read(toy).files, key=lambda one: one.nbytes)


def test_a_file_goes_on_from_where_it_stopped(toy: Path, tmp_path: Path, record: FileRecord) -> None:
    store, data, manifest = Store(tmp_path, 100 * _MB), (toy / record.path).read_bytes(), manifests.read(toy)
    first = store.incoming("model", manifest, record)
    first.add(data[:1000])
    assert store.missing("model", [record]) == [record]
    again = store.incoming("model", manifest, record)
    assert again.position == 1000
    again.add(data[1000:])
    again.finish()
    assert store.missing("model", [record]) == []
    assert (tmp_path / "model" / record.path).read_bytes() == data


def test_a_damaged_file_is_not_kept(toy: Path, tmp_path: Path, record: FileRecord) -> None:
    store, data, manifest = Store(tmp_path, 100 * _MB), bytearray((toy / record.path).read_bytes()), manifests.read(toy)
    data[len(data) // 2] ^= 1
    incoming = store.incoming("model", manifest, record)
    incoming.add(bytes(data))
    with pytest.raises(pipeload.ShardError, match="another sha256"):
        incoming.finish()
    assert store.missing("model", [record]) == [record]
    assert store.incoming("model", manifest, record).position == 0


@pytest.mark.parametrize("piece", [lambda left: bytes(0 * left), lambda left: bytes(left + 1)])
def test_a_file_of_another_size_is_refused(
    toy: Path, tmp_path: Path, record: FileRecord, piece: Callable[[int], bytes]
) -> None:
    incoming = Store(tmp_path, 100 * _MB).incoming("model", manifests.read(toy), record)
    with pytest.raises(pipeload.ShardError, match="another size"):
        incoming.add(piece(incoming.left))
    assert incoming.position == 0


def test_a_part_that_is_too_long_begins_anew(toy: Path, tmp_path: Path, record: FileRecord) -> None:
    store = Store(tmp_path, 100 * _MB)
    part = tmp_path / "model" / f"{record.path}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(record.nbytes + 1))
    assert store.incoming("model", manifests.read(toy), record).position == 0


def test_the_limit_holds_for_what_is_there_and_what_is_to_come(toy: Path, tmp_path: Path) -> None:
    records = [*manifests.read(toy).files]
    whole = sum(record.nbytes for record in records) + (toy / MANIFEST_NAME).stat().st_size + len("toy")
    sha256, content = sha256_of(toy), (toy / MANIFEST_NAME).read_bytes()
    exact, less = Store(tmp_path / "exact", whole), Store(tmp_path / "less", whole - 1)
    for store in (exact, less):
        store.begin(sha256, "toy", content)
    exact.make_room(sha256, records, ())
    fill(exact, toy, records)
    exact.make_room(sha256, records, ())
    with pytest.raises(pipeload.ConfigError, match="larger --fetch"):
        less.make_room(sha256, records, ())


def test_other_models_make_room_but_those_in_use(toy: Path, tmp_path: Path) -> None:
    """The one goes that was used the longest time ago."""
    manifest = manifests.read(toy)
    records, content = [*manifest.files], (toy / MANIFEST_NAME).read_bytes()
    whole = sum(record.nbytes for record in records) + len(content) + len("toy")
    store = Store(tmp_path, 5 * whole)
    ages_s = {"open": 5 * stores._FRESH_S, "older": 4 * stores._FRESH_S, "old": 3 * stores._FRESH_S, "fresh": 0.0}
    for name, age_s in ages_s.items():
        directory = store.begin(name, "toy", content)
        for record in records:
            incoming = store.incoming(name, manifest, record)
            incoming.add((toy / record.path).read_bytes())
            incoming.finish()
        used_s = (directory / MANIFEST_NAME).stat().st_mtime - age_s
        os.utime(directory / MANIFEST_NAME, (used_s, used_s))
    left = {"open", "older", "old", "fresh"}
    for name, gone in (("fifth", None), ("sixth", "older"), ("seventh", "old")):
        store.begin(name, "toy", content)
        store.make_room(name, records, {"open"})
        left = left - {gone} | {name}
        assert {path.name for path in tmp_path.iterdir()} == left
        for record in records:
            incoming = store.incoming(name, manifest, record)
            incoming.add((toy / record.path).read_bytes())
            incoming.finish()
    # Those that are left were used a moment ago, or are open.
    store.begin("eighth", "toy", content)
    with pytest.raises(pipeload.ConfigError, match="larger --fetch"):
        store.make_room("eighth", records, {"open"})
    assert {path.name for path in tmp_path.iterdir()} == left | {"eighth"}


def test_a_model_that_others_take_files_of_is_in_use(toy: Path, tmp_path: Path) -> None:
    """The folder that has not served anyone for longer makes room."""
    manifest = manifests.read(toy)
    records, content = [*manifest.files], (toy / MANIFEST_NAME).read_bytes()
    whole = sum(record.nbytes for record in records) + len(content) + len("toy")
    store = Store(tmp_path, 3 * whole)
    for name in ("sending", "resting"):
        directory = store.begin(name, "toy", content)
        for record in records:
            incoming = store.incoming(name, manifest, record)
            incoming.add((toy / record.path).read_bytes())
            incoming.finish()
        used_s = (directory / MANIFEST_NAME).stat().st_mtime - (3 if name == "sending" else 2) * stores._FRESH_S
        os.utime(directory / MANIFEST_NAME, (used_s, used_s))
    store.note_use("sending")
    # One that is not there, or goes at this moment, is not used.
    store.note_use("gone")
    store.begin("third", "toy", content)
    store.make_room("third", records, ())
    store.begin("fourth", "toy", content)
    with pytest.raises(pipeload.ConfigError, match="larger --fetch"):
        store.make_room("fourth", [*records, replace(records[0], path="more", nbytes=2 * whole)], ())
    assert {path.name for path in tmp_path.iterdir()} == {"sending", "third", "fourth"}
    assert store.names.keys() == {"sending", "third", "fourth"}


def test_names_of_models_outlive_the_process(toy: Path, tmp_path: Path) -> None:
    content = (toy / MANIFEST_NAME).read_bytes()
    store = Store(tmp_path, 100 * _MB)
    assert store.names == {}
    store.begin("one", "bert", content)
    store.begin("one", "", content)
    store.begin("other", "", content)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / stores._NAME).write_bytes(b"\xff")
    assert store.names == Store(tmp_path, 100 * _MB).names == {"one": "bert"}
