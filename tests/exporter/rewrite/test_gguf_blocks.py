"""Blocks made of a GGUF tensor have its values, by the formula of MatMulNBits and the sums of its blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.exporter.gguf_files import quantised

from pipeload_export.rewrite.gguf_blocks import LAYOUTS, Blocks, blocks_of
from pipeload_export.rewrite.matrices import Layout


def values_of(blocks: Blocks, layout: Layout) -> NDArray[Any]:
    """What the documentation of MatMulNBits says that blobs and scales mean, and the minima added to each block."""
    numbers = blocks.blobs
    if layout.bits == 4:
        numbers = np.stack([numbers & 15, numbers >> 4], axis=-1).reshape(*blocks.scales.shape, -1)
    made = (numbers.astype(np.float64) - (1 << layout.bits - 1)) * blocks.scales[..., None]
    if blocks.minima is not None:
        made += blocks.minima[..., None]
    return made.reshape(len(made), -1)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_blocks_have_the_values_of_the_file(kind: str) -> None:
    from gguf import GGMLQuantizationType, dequantize

    layout, rows = LAYOUTS[kind], quantised((48, 512), kind, seed=1)
    wanted = dequantize(rows, GGMLQuantizationType[kind])
    assert len(np.unique(wanted)) > 2000
    blocks = blocks_of(rows, kind)
    assert blocks.blobs.shape == (48, 512 // layout.block_size, layout.block_size * layout.bits // 8)
    assert blocks.scales.shape == (48, 512 // layout.block_size)
    found = values_of(blocks, layout)
    if layout.has_minima:
        assert blocks.minima is not None
        # Two roundings to float32, of the sizes that cancel out.
        sizes = np.abs(blocks.minima) + (1 << layout.bits) * np.abs(blocks.scales)
        np.testing.assert_array_less(np.abs(found - wanted), np.repeat(sizes, layout.block_size, axis=1) * 2.0**-23)
    else:
        assert blocks.minima is None
        np.testing.assert_array_equal(found.astype(np.float32), wanted)


@pytest.mark.parametrize("kind", [kind for kind, layout in LAYOUTS.items() if layout.has_minima])
def test_numbers_lie_around_the_middle(kind: str) -> None:
    """Activations are rounded: an offset of all numbers, which the minima take back, would multiply that error."""
    layout = LAYOUTS[kind]
    blobs = blocks_of(quantised((48, 512), kind, seed=1), kind).blobs
    numbers = np.stack([blobs & 15, blobs >> 4]) if layout.bits == 4 else blobs
    assert abs(float(numbers.mean()) - (1 << layout.bits - 1)) < 1
