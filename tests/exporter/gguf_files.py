"""Tensors as GGUF files have them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_HALVES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Where a block of a type that the package gguf only reads has its numbers of 16 bits."""


def quantised(shape: tuple[int, int], kind: str, *, seed: int) -> NDArray[np.uint8]:
    """Seeded rows of a type: quantised values where the package quantises, else any bits with scales of a usual size.

    Returns:
        `[rows, bytes]`.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quantize

    random = np.random.default_rng(seed)
    rows, columns = shape
    type_ = GGMLQuantizationType[kind]
    if kind not in _HALVES:
        made: NDArray[Any] = quantize(random.standard_normal(shape).astype(np.float32) / 8, type_)
        return made
    size, nbytes = GGML_QUANT_SIZES[type_]
    blocks = random.integers(0, 256, (rows, columns // size, nbytes), np.uint8)
    for begin in _HALVES[kind]:
        scales = random.uniform(1e-4, 2e-4, (rows, columns // size, 1)).astype(np.float16)
        blocks[..., begin : begin + 2] = scales.view(np.uint8)
    return blocks.reshape(rows, -1)


def floats_of(rows: NDArray[np.uint8], kind: str) -> NDArray[np.float32]:
    """Their values, by the package gguf."""
    from gguf import GGMLQuantizationType, dequantize

    made: NDArray[np.float32] = dequantize(rows, GGMLQuantizationType[kind])
    return made


def write_tensors(path: Path, tensors: Mapping[str, tuple[NDArray[np.uint8], str]]) -> Path:
    """A GGUF file with quantised tensors, each as rows of bytes and their type, and nothing else."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for name, (rows, kind) in tensors.items():
        writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
