"""A failure in the child that traces a checkpoint reaches the parent as one clear line."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from pipeload.errors import ExportError
from pipeload_export.source import tracing
from pipeload_export.source.tracing import Request, export_checkpoint

REQUEST = Request(name="'toy'", task="feature-extraction", weight_bytes=1000, folder="nowhere")


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the child works; a test makes its export fail by `raise_in_child`."""
    monkeypatch.setattr(tracing, "_POLL_S", 0.01)
    (tmp_path / "work").mkdir()
    return tmp_path / "work" / "onnx"


def raise_in_child(monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    code = (
        "import sys, tempfile\nfrom pathlib import Path\nfrom pipeload_export.source import tracer as child\n"
        "def fail(request, folder):\n"
        "    (folder / 'half').write_bytes(b'x')\n"
        f"    raise {error}\n"
        "child._export = fail\nchild.run_child(*sys.argv[1:])\n"
    )
    monkeypatch.setattr(tracing, "_CHILD", code)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("IndexError('list index out of range')", "IndexError: list index out of range. "),
        ("RuntimeError('several\\n lines.')", "RuntimeError: several lines. "),
        ("StopIteration()", "StopIteration. "),
        ("MemoryError()", "MemoryError. "),
    ],
)
def test_an_error_of_a_library_is_one_line_with_a_remedy(
    failing: Path, monkeypatch: pytest.MonkeyPatch, error: str, said: str
) -> None:
    raise_in_child(monkeypatch, error.replace("\n", "\\n"))
    with pytest.raises(ExportError) as caught:
        export_checkpoint(REQUEST, failing, lambda *_: None)
    assert str(caught.value).startswith(
        f"'toy' cannot be exported to ONNX: {said}Check that the checkpoint is complete"
    )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_the_systems_error_and_the_room_is_given_back(
    failing: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    raise_in_child(monkeypatch, f"OSError({number}, 'full')")
    with pytest.raises(OSError, match=str(failing.parent)) as caught:
        export_checkpoint(REQUEST, failing, lambda *_: None)
    assert caught.value.errno == number
    assert not failing.exists()


def test_temporary_files_of_the_libraries_lie_where_the_child_works(
    failing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raise_in_child(monkeypatch, "RuntimeError(tempfile.gettempdir())")
    with pytest.raises(ExportError, match=f"RuntimeError: {failing.parent}. "):
        export_checkpoint(REQUEST, failing, lambda *_: None)
