"""Headers of safetensors files, against the package safetensors."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import safetensors
from tests.fuzz.mutations import json_of
from tests.fuzz.target import Target, Trial, Wrong

from pipeload.format.dtypes import SAFETENSORS_DTYPES
from pipeload.format.manifest import WeightSpec
from pipeload.format.safetensors import check_header
from pipeload_export.source.folder import float32_bytes

_MOST_DATA = 1 << 16
_SEED = json.dumps(
    {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b.c": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "empty": {"dtype": "I64", "shape": [0, 5], "data_offsets": [32, 32]},
        "scalar": {"dtype": "U8", "shape": [], "data_offsets": [32, 33]},
    }
).encode()
_OTHER = json.dumps(
    {
        "w": {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [0, 3]},
        "v": {"dtype": "BOOL", "shape": [1], "data_offsets": [3, 4]},
    }
).encode()


def _entries(header: bytes) -> dict[str, tuple[str, tuple[int, ...], int]] | None:
    """Tensor -> dtype, shape and first byte, as the package finds them; None where it refuses the header."""
    try:
        tree = json.loads(header)
        end = max((entry["data_offsets"][1] for name, entry in tree.items() if name != "__metadata__"), default=0)
        if not 0 <= end <= _MOST_DATA:
            return None
        found: list[Any] = safetensors.deserialize(len(header).to_bytes(8, "little") + header + bytes(end))
    except (safetensors.SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    first = 8 + len(header)
    return {name: (one["dtype"], tuple(one["shape"]), first + tree[name]["data_offsets"][0]) for name, one in found}


def _spec(name: str, place: tuple[str, tuple[int, ...], int]) -> WeightSpec:
    dtype, shape, begin = place
    return WeightSpec(name=name, dtype=SAFETENSORS_DTYPES[dtype], shape=shape, offset=begin)


def _prepare() -> Trial:
    # What the engine expects of the seed's file, at the place where a header of any length puts it.
    expected = {"a": ("F32", (2, 3), 0), "b.c": ("BF16", (4,), 24)}

    def trial(data: bytes) -> bool:
        known = _entries(data)
        wanted = [_spec(name, (d, shape, 8 + len(data) + at)) for name, (d, shape, at) in expected.items()]
        if known is not None and all(dtype in SAFETENSORS_DTYPES for dtype, _, _ in known.values()):
            # A right header must not be refused.
            check_header("w", data, [_spec(name, place) for name, place in known.items()], [])
        check_header("w", data, wanted, [])
        if known is not None and any(known.get(name, ())[:2] != place[:2] for name, place in expected.items()):
            raise Wrong("the package reads other tensors than those that were expected and found")
        return True

    return trial


def _prepare_files() -> Trial:
    folder = Path(tempfile.mkdtemp())
    path = folder / "model.safetensors"

    def trial(data: bytes) -> bool:
        try:
            tree = json.loads(data)
            end = max(entry["data_offsets"][1] for name, entry in tree.items() if name != "__metadata__")
            content = bytes(min(max(end, 0), _MOST_DATA))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            content = b""
        path.write_bytes(len(data).to_bytes(8, "little") + data + content)
        found = float32_bytes(folder, [path.name])
        if not isinstance(found, int) or found < 0:
            raise Wrong("weights have no number of bytes", found)
        return True

    return trial


TARGETS = (
    Target(
        name="safetensors", what="headers of safetensors files", prepare=_prepare, seeds=lambda: [_SEED, _OTHER],
        mutate=json_of,
    ),
    Target(
        name="checkpoint", what="safetensors files of checkpoints", prepare=_prepare_files,
        seeds=lambda: [_SEED, _OTHER], mutate=json_of, share=0.3,
    ),
)  # fmt: skip
