"""What a GGUF file says of itself is held against its bytes before anything is made of it."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from tests.exporter.models import write_gguf
from tests.marks import slow

from pipeload.errors import ExportError
from pipeload.notify import silent
from pipeload_export.source import gguf_header
from pipeload_export.source.gguf_header import check_header
from pipeload_export.source.sources import find_source

gguf = pytest.importorskip("gguf")

HUGE = 1 << 60


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", kinds={"ffn_down": "Q5_0"})
    check_header(path)
    return path.read_bytes()


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(keys: bytes = b"", tensors: bytes = b"", *, key_count: int = 1, tensor_count: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensor_count, key_count) + keys + tensors


def key(kind: int, value: bytes = b"") -> bytes:
    return text("a.key") + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"GGML" + bytes(40), "does not begin with 'GGUF'"),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "it has version 9, and 2 and 3 are known"),
        (header(key_count=HUGE), "has 1152921504606846976 keys, and at most 65536"),
        (header(key_count=0, tensor_count=HUGE), "tensors, and at most 65536"),
        (header(struct.pack("<Q", HUGE)), "a name has 1152921504606846976 bytes"),
        (header(text("a.key")), "its header ends at byte 37, within a value"),
        (header(key(8, struct.pack("<Q", HUGE))), "'a.key' would end at byte"),
        (header(key(9, struct.pack("<IQ", 4, HUGE))), "ends beyond 4194304 values of arrays"),
        (header(key(9, struct.pack("<IQ", 12, 1 << 20))), "'a.key' would end at byte"),
        (header(key(9, struct.pack("<IQ", 8, 1 << 20))), "within a value"),
        (header(key(9, struct.pack("<IQ", 9, 1))), "an array of values of type 9"),
        (header(key(99)), "of the unknown type 99"),
        (header(b"", text("t") + struct.pack("<I", 1 << 30), key_count=0, tensor_count=1), "1073741824 dimensions"),
        (
            header(b"", text("t") + struct.pack("<IQQIQ", 2, 1 << 40, 1 << 40, 2, 0), key_count=0, tensor_count=1),
            r"tensor 't' of shape \[1099511627776, 1099511627776\] does not fit into its 65 bytes",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused_before_a_library_reads_it(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ExportError, match=f"m.gguf is no GGUF file, or a damaged one: .*{said}.* Fetch it again"):
        find_source(str(tmp_path / "m.gguf"), progress=silent)


@pytest.mark.parametrize("step", [97, slow(3)])
@pytest.mark.parametrize("value", [HUGE, (1 << 64) - 1, 1 << 31, 0], ids=hex)
def test_no_number_anywhere_in_the_header_makes_a_library_hang(
    value: int, step: int, valid: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_header, "_MOST_VALUES", 1 << 12)
    path, end = tmp_path / "m.gguf", gguf.GGUFReader(write_gguf(tmp_path / "whole.gguf")).data_offset
    refused = 0
    for place in range(4, end - 8, step):
        path.write_bytes(valid[:place] + struct.pack("<Q", value) + valid[place + 8 :])
        try:
            check_header(path)
        except ValueError:
            refused += 1
            continue
        try:
            gguf.GGUFReader(path)
        except (ValueError, KeyError, IndexError, OverflowError):
            refused += 1
    assert refused


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_file_that_was_cut_is_refused(share: float, valid: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(valid[: int(len(valid) * share)])
    with pytest.raises(ExportError, match=r"is no GGUF file, or a damaged one"):
        find_source(str(tmp_path / "m.gguf"), progress=silent)
