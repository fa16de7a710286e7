"""Run one sharded model directory on seeded inputs and save its outputs: run.py starts it on each machine."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pipeload

BATCH = 2
TOKENS = 16


def vocabulary(config: dict[str, Any]) -> int:
    """Return how many token ids there are, where the configuration says so."""
    return int(config.get("vocab_size") or config.get("text_config", {}).get("vocab_size") or 1000)


def extent(dimension: int | str, config: dict[str, Any]) -> int:
    """Return a size for one dimension of a graph input."""
    if isinstance(dimension, int):
        return dimension
    if "batch" in dimension:
        return BATCH
    if "channel" in dimension:
        return int(config.get("num_channels", 3))
    if dimension in ("height", "width"):
        size = config.get("image_size", 224)
        return int(size if isinstance(size, int) else size[dimension == "width"])
    return TOKENS


def make_input(
    name: str, dtype: str, shape: tuple[int, ...], config: dict[str, Any], random: np.random.Generator
) -> NDArray[Any]:
    """Return an array that is equal, bit for bit, on every machine for one seed."""
    kind = np.dtype(dtype)
    if name.endswith("attention_mask") or kind.kind == "b":
        return np.ones(shape, kind)
    if name == "token_type_ids":
        return np.zeros(shape, kind)
    if name == "position_ids":
        return np.broadcast_to(np.arange(shape[-1], dtype=kind), shape).copy()
    if kind.kind in "iu":
        return random.integers(0, min(1000, vocabulary(config)), shape).astype(kind)
    # Uniform, not normal: the tails of a normal draw go through the C library's logarithm.
    return (random.random(shape, dtype=np.float32) * 2 - 1).astype(kind)


def run(directory: Path, *, seed: int, memory_budget: str) -> dict[str, NDArray[Any]]:
    """Return the model's outputs by name."""
    config = json.loads((directory / "config.json").read_text())
    random = np.random.default_rng(seed)
    with pipeload.load(directory, memory_budget=memory_budget) as model:
        inputs = {
            item.name: make_input(
                item.name, item.dtype, tuple(extent(size, config) for size in item.shape), config, random
            )
            for item in model.inputs
        }
        return {name: np.array(value) for name, value in model.run(inputs).items()}


def main() -> int:
    """Parse the command line, run, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("target", type=Path, help="the .npz file to write")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--memory-budget", required=True)
    arguments = parser.parse_args()
    try:
        outputs = run(arguments.directory, seed=arguments.seed, memory_budget=arguments.memory_budget)
    except (OSError, ValueError, pipeload.PipeloadError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    # Saved by position: an output may have a name that has another meaning in np.savez or in a zip archive.
    np.savez(arguments.target, np.array(list(outputs), dtype=np.str_), *outputs.values())
    return 0


if __name__ == "__main__":
    sys.exit(main())
