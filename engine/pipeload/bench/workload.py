"""What a contender is asked, the same for each: seeded inputs, and how passes over them are timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeload.bench.cgroup import read_bytes
from pipeload.errors import ConfigError
from pipeload.manifest import Manifest, TensorSpec, evaluate_dim, symbols
from pipeload.planner import planning_dims
from pipeload.tasks.batch import position_ids
from pipeload.tasks.config import ModelConfig, read_settings
from pipeload.tasks.embed import embed
from pipeload.tasks.generate import generate
from pipeload.tasks.runner import Decoder, free_inputs, graph_inputs

__all__ = ["PROMPT_TOKENS", "Measured", "Work", "input_dims", "step_dims", "work_inputs"]

PROMPT_TOKENS = 16
"""Length of the prompt that a decoder starts from."""

Arrays = dict[str, NDArray[Any]]
AnyDecoder = Decoder[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Times and outputs of one contender; see `Result`."""

    first_s: float
    passes_s: tuple[float, ...]
    read_bytes: int
    outputs: Arrays
    answer: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What to ask of a model. Each method asks an opened model, whose opening began at `begin_s` (perf_counter).

    Attributes:
        manifest: the model.
        directory: where it lies.
        sizes: sizes of symbolic dimensions.
        passes: steady passes after the first.
        before_pass: called before each steady pass, outside its time.
    """

    manifest: Manifest
    directory: Path
    sizes: Mapping[str, int]
    passes: int
    before_pass: Callable[[], None]

    def run(self, inputs: Arrays, runner: AnyDecoder, begin_s: float) -> Measured:
        """The same inputs in every pass."""
        return self._laps(lambda: runner.run(inputs), begin_s, lambda _: None)

    def decode(self, inputs: Arrays, runner: AnyDecoder, begin_s: float) -> Measured:
        """A pass over the prompt, then greedily one token a pass with its KV caches kept."""
        tokens: list[int] = []
        with runner.new_state(PROMPT_TOKENS + self.passes + 1) as state:
            new = inputs["input_ids"]
            mask = np.ones_like(new)

            def step() -> Arrays:
                nonlocal new, mask
                offered = {
                    "input_ids": new,
                    "attention_mask": mask,
                    "position_ids": position_ids(mask)[:, -new.shape[1] :],
                    "token_type_ids": np.zeros_like(new),
                }
                logits = runner.step(graph_inputs(runner, offered), state)
                new = logits.argmax(axis=-1)[:, None]
                mask = np.concatenate([mask, np.ones_like(new)], axis=1)
                tokens.append(int(new[0, 0]))
                return {"token_ids": np.array(tokens), "logits": logits}

            return self._laps(step, begin_s, lambda _: list(tokens))

    def embed(self, texts: list[str], runner: AnyDecoder, begin_s: float) -> Measured:
        """Sentences; the answer is their similarity."""

        def similarity(made: Arrays) -> Any:
            return np.round(made["vectors"] @ made["vectors"].T, 4).tolist()

        return self._laps(lambda: {"vectors": embed(runner, texts)}, begin_s, similarity)

    def generate(self, prompt: str | list[int], runner: AnyDecoder, begin_s: float) -> Measured:
        """One token, then as many as there are passes; the answer is the text, or the ids without a tokenizer."""
        first = generate(runner, prompt, max_new_tokens=1)
        first_s = time.perf_counter() - begin_s
        before, lap = read_bytes(), time.perf_counter()
        whole = generate(runner, prompt, max_new_tokens=self.passes)
        each_s = (time.perf_counter() - lap) / len(whole.token_ids)
        if whole.token_ids[0] != first.token_ids[0]:
            raise ConfigError(f"{self.directory} answers differently each time: {first} and {whole}.")
        return Measured(
            first_s=first_s,
            passes_s=(each_s,),
            read_bytes=(read_bytes() - before) // len(whole.token_ids),
            outputs={"token_ids": np.array(whole.token_ids)},
            answer=whole.text if whole.text is not None else list(whole.token_ids),
        )

    def inputs(self) -> Arrays:
        """What the first pass takes, without caches."""
        made = work_inputs(self.manifest, self.directory, input_dims(self.manifest, self.directory, self.sizes))
        return {spec.name: made[spec.name] for spec in free_inputs(self.manifest)}

    def _laps(self, work: Callable[[], Arrays], begin_s: float, answer: Callable[[Arrays], Any]) -> Measured:
        outputs = work()
        first_s = time.perf_counter() - begin_s
        before = read_bytes()
        seconds: list[float] = []
        for _ in range(self.passes):
            self.before_pass()
            lap = time.perf_counter()
            outputs = work()
            seconds.append(time.perf_counter() - lap)
        return Measured(
            first_s=first_s,
            passes_s=tuple(seconds),
            read_bytes=(read_bytes() - before) // self.passes,
            outputs=outputs,
            answer=answer(outputs),
        )


def work_inputs(manifest: Manifest, directory: Path, dims: Mapping[str, int]) -> Arrays:
    """An array for every graph input, caches included: masks of ones, positions that count up, the rest seeded."""
    rows = read_settings(directory, "config.json", ModelConfig).vocab_size or 2
    generator = np.random.default_rng(0)
    return {spec.name: _array(spec, dims, rows, generator) for spec in manifest.inputs}


def input_dims(manifest: Manifest, directory: Path, sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes of all symbolic dimensions of the first pass: given, the image's, a decoder's prompt, or the usual."""
    known: dict[str, int] = {}
    for spec in free_inputs(manifest):
        if len(spec.shape) == 4:
            config = read_settings(directory, "config.json", ModelConfig)
            image = (config.num_channels or 3, *(config.image_height_width or (224, 224)))
            known |= {dim: size for dim, size in zip(spec.shape[1:], image, strict=True) if isinstance(dim, str)}
        elif manifest.caches and spec.name == "input_ids":
            known |= dict.fromkeys(symbols(spec.shape[-1]), PROMPT_TOKENS)
    return planning_dims(manifest, known | dict(sizes))


def step_dims(manifest: Manifest, dims: Mapping[str, int]) -> dict[str, int]:
    """The dimensions of a steady pass: the same, or for a decoder one new token after the prompt."""
    if not manifest.caches:
        return dict(dims)
    prompt = next(spec for spec in manifest.inputs if spec.name == "input_ids")
    new = set(symbols(prompt.shape[-1]))
    cached = {cache.input for cache in manifest.caches}
    kept = {s for spec in manifest.inputs if spec.name in cached for dim in spec.shape[1:] for s in symbols(dim)}
    length = max((dims[symbol] for symbol in new), default=1)
    return {**dims, **dict.fromkeys(kept - new, length), **dict.fromkeys(new, 1)}


def _array(spec: TensorSpec, dims: Mapping[str, int], rows: int, generator: np.random.Generator) -> NDArray[Any]:
    shape = tuple(evaluate_dim(dim, dims) for dim in spec.shape)
    if "position" in spec.name:
        array: NDArray[Any] = np.broadcast_to(np.arange(shape[-1]), shape)
    elif "type" in spec.name:
        array = np.zeros(shape)
    elif "mask" in spec.name or spec.dtype == "bool":
        array = np.ones(shape)
    elif "int" in spec.dtype:
        array = generator.integers(0, rows, shape)
    else:
        array = generator.standard_normal(shape)
    return np.ascontiguousarray(array.astype(spec.dtype))
