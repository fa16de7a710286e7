"""A manifest is a regular file of bounded size."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeload.errors import ManifestError
from pipeload.format import manifest as manifests
from pipeload.format.manifest import MANIFEST_NAME


def test_a_pipe_in_place_of_the_manifest_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / MANIFEST_NAME)
    with pytest.raises(ManifestError, match=r"pipeload\.json cannot be read: it is a pipe, no regular file\. Copy or"):
        manifests.read(tmp_path)


def test_an_endless_device_in_place_of_the_manifest_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).symlink_to("/dev/zero")
    with pytest.raises(ManifestError, match="it is a device, no regular file"):
        manifests.read(tmp_path)


def test_a_manifest_that_is_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).symlink_to(MANIFEST_NAME)
    with pytest.raises(ManifestError, match="Too many levels of symbolic links"):
        manifests.read(tmp_path)


def test_a_manifest_over_its_limit_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / MANIFEST_NAME).open("wb") as file:
        file.truncate((16 << 20) + 1)
    with pytest.raises(ManifestError, match=r"holds more than the 16\.8 MB that are read of it"):
        manifests.read(tmp_path)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000])
def test_a_directory_whose_name_cannot_be_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ManifestError, match="cannot be read"):
        manifests.read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("owner/name", "`pipeload export owner/name name` if that is a model of the hub"),
        ("checkpoint", "`pipeload export checkpoint checkpoint-pipeload`"),
        ("name", "`pipeload export SOURCE TARGET`"),
    ],
)
def test_what_is_no_directory_of_a_model_is_told_how_to_make_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").touch()
    with pytest.raises(ManifestError, match=f"Make one with {command}"):
        manifests.read(Path(name))
