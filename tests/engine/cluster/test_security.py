"""Outside loopback, none connects without a certificate of the cluster's CA."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import pytest
from tests.engine.cluster.processes import Cluster
from tests.engine.cluster.test_answers import references
from tests.engine.harness import assert_close

import pipeload
from pipeload.cluster.certificates import make_certificates, security_of


def test_keys_can_be_read_by_their_owner_only(tmp_path: Path) -> None:
    files = make_certificates(tmp_path / "made")
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in files}
    assert {name for name, mode in modes.items() if mode == 0o600} == {name for name in modes if "-key" in name}
    assert len(files) == 8


def test_files_that_exist_are_left_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "node-key.pem").write_text("mine")
    with pytest.raises(pipeload.ConfigError, match=r"already has node-key\.pem"):
        make_certificates(tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("address", "fact"),
    [
        ("tcp://10.0.0.1:8786", "needs TLS"),
        ("tls://10.0.0.1:8786", "needs certificates"),
        ("10.0.0.1", "no address"),
        ("http://127.0.0.1:80", "no address"),
        ("tcp://127.0.0.1:65536", "no address"),
    ],
)
def test_an_address_that_others_reach_needs_certificates(address: str, fact: str) -> None:
    with pytest.raises(pipeload.ConfigError, match=fact):
        pipeload.connect(address)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    make_certificates(tmp_path / "made")
    (tmp_path / "made" / "client-key.pem").unlink()
    with pytest.raises(pipeload.ConfigError, match=r"client-key\.pem cannot be read"):
        security_of("tls://127.0.0.1:1", tmp_path / "made", "client")


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    make_certificates(tmp_path / "made")
    (tmp_path / "made" / "client.pem").write_text("no certificate")
    with pytest.raises(pipeload.ConfigError, match="cannot be used"):
        security_of("tls://127.0.0.1:1", tmp_path / "made", "client")


def test_others_certificates_are_refused(models: Path, tmp_path: Path) -> None:
    """Of the scheduler's CA, a node and a client take part; of another one, neither, and both are told at once."""
    own, other, halves = tmp_path / "own", tmp_path / "other", tmp_path / "halves"
    make_certificates(own)
    make_certificates(other)
    # It trusts the scheduler, which does not trust it.
    shutil.copytree(other, halves)
    shutil.copy(own / "ca.pem", halves)
    with Cluster(models, tmp_path, own) as cluster:
        assert cluster.address.startswith("tls://")
        cluster.start({"node": "400MB"})
        assert "do not accept each other's certificates" in cluster.refused("stranger", "400MB", halves)
        for refused in (other, halves):
            with pytest.raises(pipeload.ClusterError, match="do not accept each other's certificates"):
                pipeload.connect(cluster.address, refused)
        with pipeload.connect(cluster.address, own) as connection, connection.load("bert") as model:
            inputs = references(models / "bert")[0]
            assert [node.offer.name for node in connection.nodes()] == ["node"]
            with pipeload.load(models / "bert") as alone:
                assert_close(model.run(inputs), alone.run(inputs), 1e-5)
