"""A graph that onnxruntime does not open is told from a system that does not let it."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from tests.engine.harness import no_descriptors
from tests.exporter.models import write_onnx

from pipeload.errors import ExportError
from pipeload_export.graph.runtime import open_session


def test_a_process_without_descriptors_is_not_told_to_fetch_the_graph_again(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "model.onnx")
    with no_descriptors(), pytest.raises(OSError, match="Too many open files") as caught:
        open_session(path, "the graph")
    assert (caught.value.errno, caught.value.filename) == (errno.EMFILE, str(path))
    open_session(path, "the graph")


def test_a_damaged_graph_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportError, match=r"does not open the graph: .*Fetch or export it again"):
        open_session(tmp_path / "model.onnx", "the graph")
