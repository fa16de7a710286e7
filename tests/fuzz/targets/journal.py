"""The journal of an export: damage to it costs time, and nothing else."""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec
from tests.fuzz.mutations import bytes_of, json_of, one_of
from tests.fuzz.target import Target, Trial, Wrong

from pipeload_export.write.journal import Finished, Journal

_PLAN = "1" * 64
_LINES = [
    Finished(path=f"result/shards/block.00{number}.safetensors", plan=_PLAN, nbytes=3, sha256="2" * 64,
             ranges=((4096, 8192, "3" * 64),))
    for number in range(2)
]  # fmt: skip


def _prepare() -> Trial:
    root = Path(tempfile.mkdtemp())
    left = root / "before" / "one" / "result" / "shards"
    left.mkdir(parents=True)
    (root / "result" / "shards").mkdir(parents=True)
    names = [Path(line.path).name for line in _LINES]

    def trial(data: bytes) -> bool:
        (root / "journal").write_bytes(data)
        (left / names[0]).write_bytes(b"abc")
        journal = Journal(root)
        taken = [journal.take(root / "result" / "shards" / name, _PLAN) for name in names]
        if any(found and (found.path, found.plan, found.nbytes) != (f"result/shards/{name}", _PLAN, 3)
               for found, name in zip(taken, names, strict=True)):  # fmt: skip
            raise Wrong("it takes a file that is not the one that was finished")
        return any(taken)

    return trial


TARGETS = (
    Target(
        name="journal",
        what="journals of killed exports",
        prepare=_prepare,
        seeds=lambda: [
            *map(msgspec.json.encode, _LINES),
            b"\n".join([*map(msgspec.json.encode, _LINES), b""]),
            msgspec.json.encode(_LINES[0]) + b"\n" + msgspec.json.encode(_LINES[1])[:40],
        ],
        mutate=one_of(json_of, bytes_of),
        share=0.3,
    ),
)
