"""One contender in a process of its own: `python -m benchmarks.contender ENGINE DIR TASK` prints one JSON line.

ENGINE is `pipeload`, `single` (one session, defaults) or `mapped` (one session, external data, no prepacking).
TASK is `embed` (three sentences), `generate` (a prompt, greedy) or `run` (seeded inputs of given sizes).
Times: `first_s` from opening the model to its first answer, without imports; `steady_s` the median of later passes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

import pipeload
from pipeload.manifest import evaluate_dim
from pipeload.memory import peak_rss_bytes, rss_bytes
from pipeload.planner import planning_dims

SENTENCES = ["A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby."]
PROMPT = "The capital of France is"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=["pipeload", "single", "mapped"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("task", choices=["embed", "generate", "run"])
    parser.add_argument("--onnx", type=Path, help="the unsplit graph, for single and mapped")
    parser.add_argument("--budget", default="auto")
    parser.add_argument("--passes", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=4, help="new tokens to generate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", action="append", default=[], metavar="DIM=N", help="sizes to plan for, and to run")
    parser.add_argument("--save", type=Path, help="where the outputs go, as .npz")
    arguments = parser.parse_args()
    if arguments.task == "generate":
        # A config with a vocabulary but no tokenizer (seeded weights) takes token ids.
        arguments.prompt = PROMPT if (arguments.directory / "tokenizer.json").exists() else [464, 3139, 286, 4881, 318]
    before = rss_bytes()
    begin = time.perf_counter()
    if arguments.engine == "pipeload":
        sizes = {name: int(size) for name, size in (pair.split("=") for pair in arguments.size)}
        with pipeload.load(arguments.directory, arguments.budget, threads=arguments.threads, sizes=sizes) as model:
            record = _measure(model, arguments, begin)
            plan = model.plan
            record |= {
                "budget_bytes": plan.budget_bytes,
                "planned_peak_bytes": plan.peak_bytes,
                "read_bytes": model.stats.read_bytes,
                "resident": len(plan.resident),
                "buffers": plan.buffers,
            }
    else:
        from benchmarks.single import SingleSession

        mapped = arguments.engine == "mapped"
        model = SingleSession(arguments.onnx, arguments.directory, mapped=mapped, threads=arguments.threads)
        record = _measure(model, arguments, begin)
    record |= {"engine": arguments.engine, "before_bytes": before, "peak_rss_bytes": peak_rss_bytes()}
    print(json.dumps(record))


def _measure(model: Any, arguments: argparse.Namespace, begin: float) -> dict[str, Any]:
    record: dict[str, Any]
    seconds: list[float] = []
    if arguments.task == "embed":
        from pipeload.tasks.embed import embed

        vectors = embed(model, SENTENCES)
        first_s = time.perf_counter() - begin
        for _ in range(arguments.passes):
            lap = time.perf_counter()
            vectors = embed(model, SENTENCES)
            seconds.append(time.perf_counter() - lap)
        record = {"answer": np.round(vectors @ vectors.T, 4).tolist()}
        outputs = {"vectors": vectors}
    elif arguments.task == "generate":
        from pipeload.tasks.generate import generate

        first = generate(model, arguments.prompt, max_new_tokens=1)
        first_s = time.perf_counter() - begin
        lap = time.perf_counter()
        result = generate(model, arguments.prompt, max_new_tokens=arguments.tokens)
        seconds.append((time.perf_counter() - lap) / len(result.token_ids))
        assert result.token_ids[0] == first.token_ids[0]
        record = {"answer": result.text if result.text is not None else list(result.token_ids)}
        outputs = {"token_ids": np.array(result.token_ids)}
    else:
        inputs = _seeded_inputs(model, dict(pair.split("=") for pair in arguments.size))
        outputs = model.run(inputs)
        first_s = time.perf_counter() - begin
        for _ in range(arguments.passes):
            lap = time.perf_counter()
            outputs = model.run(inputs)
            seconds.append(time.perf_counter() - lap)
        digest = hashlib.sha256(b"".join(array.tobytes() for array in outputs.values())).hexdigest()
        record = {"answer": digest}
    if arguments.save:
        np.savez(arguments.save, **outputs)
    return record | {"first_s": first_s, "steady_s": statistics.median(seconds), "passes_s": seconds}


def _seeded_inputs(model: Any, sizes: dict[str, str]) -> dict[str, Any]:
    """Masks of ones, small ids, normal numbers: the same for every contender."""
    generator = np.random.default_rng(0)
    dims = planning_dims(model.manifest, {name: int(size) for name, size in sizes.items()})
    caches = {cache.input for cache in model.manifest.caches}
    inputs = {}
    for spec in model.manifest.inputs:
        if spec.name in caches:
            continue
        shape = [evaluate_dim(dim, dims) for dim in spec.shape]
        if spec.dtype.startswith("float"):
            inputs[spec.name] = generator.standard_normal(shape).astype(spec.dtype)
        elif "mask" in spec.name:
            inputs[spec.name] = np.ones(shape, spec.dtype)
        elif "type" in spec.name:
            inputs[spec.name] = np.zeros(shape, spec.dtype)
        else:
            inputs[spec.name] = generator.integers(0, 1000, shape).astype(spec.dtype)
    return inputs


if __name__ == "__main__":
    main()
