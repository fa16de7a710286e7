"""The work of a contender, the same for each: seeded inputs, and timed passes over them."""

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
from pipeload.format.caches import past_symbols
from pipeload.format.manifest import Manifest, symbols
from pipeload.measuring.example_inputs import example_inputs
from pipeload.planning.needs import planning_dims
from pipeload.storage.model_files import ModelFiles
from pipeload.tasks.embed.embed import embed
from pipeload.tasks.generate.cached_text import Reading
from pipeload.tasks.generate.generate import generate
from pipeload.tasks.images import image_sizes
from pipeload.tasks.model_files import read_config
from pipeload.tasks.runner import Decoder

__all__ = ["PROMPT_TOKENS", "Measured", "Work", "input_dims", "step_dims"]

PROMPT_TOKENS = 16
"""The number of tokens in the prompt that a decoder starts from."""

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
    """The work for a model. Each method runs it on an opened model, whose opening began at `begin_s` (perf_counter).

    Attributes:
        manifest: the model.
        directory: where it lies.
        sizes: sizes of symbolic dimensions.
        settling: passes after the first that do not count.
        passes: the number of steady passes after those.
        before_pass: called before each pass but the first, outside its time.
    """

    manifest: Manifest
    directory: Path
    sizes: Mapping[str, int]
    settling: int
    passes: int
    before_pass: Callable[[], None]

    def run(self, inputs: Arrays, runner: AnyDecoder, begin_s: float) -> Measured:
        """Run the same inputs in every pass."""
        return self._laps(lambda: runner.run(inputs), begin_s, lambda _: None)

    def decode(self, inputs: Arrays, runner: AnyDecoder, begin_s: float) -> Measured:
        """Run one pass over the prompt, then decode greedily one token per pass with the KV caches kept."""
        tokens: list[int] = []
        with runner.new_state(PROMPT_TOKENS + self.settling + self.passes + 1) as state:
            texts: list[list[int]] = inputs["input_ids"].tolist()
            reading = Reading(runner, state)

            def step() -> Arrays:
                made = reading.scores(texts, padding=[0] * len(texts), positions=1, top=None)
                logits = np.concatenate([one.logits for (one,) in made])
                for text, token in zip(texts, logits.argmax(axis=-1).tolist(), strict=True):
                    text.append(token)
                tokens.append(texts[0][-1])
                return {"token_ids": np.array(tokens), "logits": logits}

            return self._laps(step, begin_s, lambda _: list(tokens))

    def embed(self, texts: list[str], runner: AnyDecoder, begin_s: float) -> Measured:
        """Embed sentences; the answer is their similarity."""

        def similarity(made: Arrays) -> Any:
            return np.round(made["vectors"] @ made["vectors"].T, 4).tolist()

        return self._laps(lambda: {"vectors": embed(runner, texts)}, begin_s, similarity)

    def generate(self, prompt: str | list[int], runner: AnyDecoder, begin_s: float) -> Measured:
        """Generate one token, then one per pass; the answer is the text, or the ids without a tokenizer."""
        first = generate(runner, prompt, max_new_tokens=1, do_sample=False)
        first_s = time.perf_counter() - begin_s
        before, lap = read_bytes(), time.perf_counter()
        whole = generate(runner, prompt, max_new_tokens=self.passes, do_sample=False)
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
        """The inputs of the first pass, without caches."""
        rows = read_config(ModelFiles(self.directory, self.manifest)).vocab_size
        made = example_inputs(self.manifest, input_dims(self.manifest, self.directory, self.sizes), rows)
        return {spec.name: made[spec.name] for spec in self.manifest.free_inputs}

    def _laps(self, work: Callable[[], Arrays], begin_s: float, answer: Callable[[Arrays], Any]) -> Measured:
        outputs = work()
        first_s = time.perf_counter() - begin_s
        for _ in range(self.settling):
            self.before_pass()
            work()
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


def input_dims(manifest: Manifest, directory: Path, sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes of all symbolic dimensions of the first pass: given, the image's, a prompt's, or the default."""
    known = image_sizes(ModelFiles(directory, manifest), manifest)
    if manifest.caches:
        known |= dict.fromkeys(_new_symbols(manifest), PROMPT_TOKENS)
    return planning_dims(manifest, known | dict(sizes))


def step_dims(manifest: Manifest, dims: Mapping[str, int]) -> dict[str, int]:
    """The dimensions of a steady pass: the same, or for a decoder one new token after the prompt."""
    if not manifest.caches:
        return dict(dims)
    new = _new_symbols(manifest)
    length = max((dims[symbol] for symbol in new), default=1)
    return {**dims, **dict.fromkeys(past_symbols(manifest), length), **dict.fromkeys(new, 1)}


def _new_symbols(manifest: Manifest) -> set[str]:
    """Symbols of the lengths of a decoder's new tokens."""
    prompt = next((spec for spec in manifest.inputs if spec.name == "input_ids"), None)
    return set(symbols(prompt.shape[-1])) if prompt else set()
