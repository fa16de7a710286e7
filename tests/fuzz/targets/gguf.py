"""GGUF files, up to where transformers gets them, against the package gguf."""

from __future__ import annotations

import tempfile
from pathlib import Path
from random import Random
from typing import Any

import gguf
import numpy as np
from tests.fuzz.mutations import damaged
from tests.fuzz.target import Target, Trial, Wrong

from pipeload_export.source.folder import float32_bytes
from pipeload_export.source.gguf_header import check_header

_NUMBERS = (0, 1, 2, 3, 8, 9, 10, 12, 13, 99, 255, 1 << 16, 1 << 22, 1 << 31, 1 << 32, 1 << 60, 1 << 63, (1 << 64) - 1)


def _seed(*, big_endian: bool = False) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "seed.gguf"
        order = gguf.GGUFEndian.BIG if big_endian else gguf.GGUFEndian.LITTLE
        writer = gguf.GGUFWriter(path, "llama", endianess=order)
        writer.add_uint32("llama.block_count", 1)
        writer.add_float32("llama.rope.freq_base", 10000.0)
        writer.add_bool("tokenizer.ggml.add_bos_token", True)
        writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "<s>"])
        writer.add_array("tokenizer.ggml.scores", [0.5, 1.0, 2.0])
        writer.add_array("tokenizer.ggml.token_type", [1, 1, 3])
        writer.add_tensor("token_embd.weight", np.ones((3, 32), np.float32))
        writer.add_tensor("blk.0.attn_q.weight", np.ones((2, 18), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def _mutate(chance: Random, pool: Any) -> bytes:
    """Damaged bytes, most of them numbers, in the header."""
    data = bytearray(chance.choice(pool))
    if chance.random() < 0.4:
        return damaged(chance, bytes(data), pool)
    for _ in range(chance.choice((1, 1, 2, 3))):
        size = chance.choice((4, 4, 8, 8, 1))
        at = int(chance.random() * max(1, min(len(data), 700)))
        data[at : at + size] = (chance.choice(_NUMBERS) % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(data)


def _folder() -> Path:
    return Path(tempfile.mkdtemp())


def _prepare_header() -> Trial:
    path = _folder() / "m.gguf"

    def trial(data: bytes) -> bool:
        path.write_bytes(data)
        try:
            check_header(path)
        except ValueError:  # its documented refusal, which its caller turns into an ExportError
            return False
        return True

    return trial


def _prepare() -> Trial:
    folder = _folder()
    path = folder / "m.gguf"

    def trial(data: bytes) -> bool:
        path.write_bytes(data)
        found = float32_bytes(folder, [path.name])
        if found != 4 * sum(int(np.prod(tensor.shape)) for tensor in gguf.GGUFReader(path).tensors):
            raise Wrong("tensors have another number of elements", found)
        return True

    return trial


TARGETS = (
    Target(
        name="gguf_header", what="headers of GGUF files", prepare=_prepare_header, mutate=_mutate,
        seeds=lambda: [_seed(), _seed(big_endian=True)],
    ),
    Target(
        name="gguf", what="GGUF files, by the package gguf", prepare=_prepare, mutate=_mutate, native=True, share=0.5,
        seeds=lambda: [_seed(), _seed(big_endian=True)],
    ),
)  # fmt: skip
