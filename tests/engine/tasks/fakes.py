"""Models of a few lines of numpy, and model directories with tiny tokenizers, for the tests of the tasks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeload.errors import BudgetError
from pipeload.format.manifest import MANIFEST_NAME, Cache, Manifest, TensorSpec
from pipeload.pipeline.joining import Padding
from pipeload.pipeline.top_logits import RunningTop, TopLogits
from pipeload.storage.model_files import ModelFiles
from pipeload.tracing.stats import Stats

Array = NDArray[Any]

TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat dog sat on mat ##s ##ly paris london is nice anna bob in".split()  # noqa: SIM905
CORPUS = ["The capital of France is Paris.", "Zwölf Boxkämpfer jagen Viktor", "naïve café 🙂 日本語", "  two  spaces\n"]


def manifest(
    task: str,
    inputs: tuple[str, ...] = TEXT_INPUTS,
    outputs: Mapping[str, tuple[int | str, ...]] | None = None,
    *,
    dtype: str = "int64",
    cached: bool = False,
) -> Manifest:
    """A manifest with just the fields that the tasks look at."""
    specs = [TensorSpec(name=name, dtype=dtype, shape=("batch_size", "sequence_length")) for name in inputs]
    caches = (Cache(input="past.0", output="present.0"),) if cached else ()
    if cached:
        specs.append(TensorSpec(name="past.0", dtype="float32", shape=("batch_size", 1, "past_sequence_length", 1)))
    return Manifest(
        exporter="test",
        source="test",
        model_type="toy",
        task=task,
        inputs=tuple(specs),
        outputs=tuple(
            TensorSpec(name=name, dtype="float32", shape=shape)
            for name, shape in (outputs or {"logits": ("batch_size", 3)}).items()
        ),
        edges=(),
        caches=caches,
        shards=(),
        structures={},
        files=(),
    )


class WithFiles:
    """A model directory and its files."""

    directory: Path
    manifest: Manifest

    @property
    def files(self) -> ModelFiles:
        return ModelFiles(self.directory, self.manifest)

    def room_for(self, most_bytes: int) -> AbstractContextManager[None]:
        return nullcontext()


class ToyRunner(WithFiles):
    """Runs a Python function instead of a model, and keeps the arguments of each call."""

    def __init__(
        self, directory: Path, manifest: Manifest, function: Callable[[Mapping[str, Array]], dict[str, Array]]
    ) -> None:
        self.directory = directory
        self.manifest = manifest
        self.function = function
        self.calls: list[dict[str, Array]] = []
        self.largest_batch: int | None = None
        self.rooms: list[int] = []
        self.largest_room: int | None = None

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        rows = len(next(iter(inputs.values())))
        if self.largest_batch is not None and rows > self.largest_batch:
            raise BudgetError("too small", needed_bytes=2, budget_bytes=1)
        self.calls.append(dict(inputs))
        return self.function(inputs)

    def run_rows(self, inputs: Mapping[str, Array], padding: Padding, *, passes: int = 0) -> dict[str, Array]:
        return self.run(inputs)

    @contextmanager
    def room_for(self, most_bytes: int) -> Iterator[None]:
        if self.largest_room is not None and most_bytes > self.largest_room:
            raise BudgetError("too small", needed_bytes=2, budget_bytes=1)
        self.rooms.append(most_bytes)
        try:
            yield
        finally:
            self.rooms[-1] = 0


def run_by_torch(model: Any) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    """The function of a `ToyRunner` that runs a model of transformers."""
    import torch

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        with torch.no_grad():
            outputs = model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
        return {name: value.numpy() for name, value in outputs.items()}

    return run


class ToyState:
    """All tokens that a `ToyDecoder` has seen."""

    def __init__(self) -> None:
        self.ids = np.zeros((0, 0), np.int64)
        self.positions = np.zeros((0, 0), np.int64)
        self.closed = False
        self.expected = 0

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + self.positions.nbytes

    def expect(self, tokens: int) -> None:
        self.expected = tokens

    def truncate(self, length: int) -> None:
        self.ids, self.positions = self.ids[:, :length], self.positions[:, :length]

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> ToyState:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ToyDecoder(WithFiles):
    """A decoder whose next token depends on every token before it, on its position, and on the mask.

    So a padding token that is not masked, or a position that is wrong, changes its answer.
    """

    vocabulary = 20
    own_draft = draft = None

    def __init__(
        self,
        directory: Path,
        inputs: tuple[str, ...] = ("input_ids", "attention_mask", "position_ids"),
        *,
        task: str = "text-generation",
        cached: bool = True,
        script: list[int] | None = None,
    ) -> None:
        self.directory = directory
        self.manifest = manifest(
            task, inputs, {"logits": ("batch_size", "sequence_length", self.vocabulary)}, cached=cached
        )
        self.script = script
        self.states: list[ToyState] = []
        self.capacities: list[int] = []
        self.steps: list[dict[str, Array]] = []

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        raise NotImplementedError

    def run_rows(self, inputs: Mapping[str, Array], padding: Padding, *, passes: int = 0) -> dict[str, Array]:
        raise NotImplementedError

    def new_state(self, capacity: int = 0) -> ToyState:
        self.capacities.append(capacity)
        self.states.append(ToyState())
        return self.states[-1]

    @property
    def stats(self) -> Stats:
        return Stats()

    def step(self, inputs: Mapping[str, Array], state: ToyState, *, positions: int = 1) -> NDArray[np.float32]:
        self.steps.append(dict(inputs))
        ids = inputs["input_ids"]
        places = inputs.get("position_ids", np.arange(state.length, state.length + ids.shape[1])[None] + 0 * ids)
        if state.length:
            ids = np.concatenate([state.ids, ids], axis=1)
            places = np.concatenate([state.positions, places], axis=1)
        state.ids, state.positions = ids, places
        mask = inputs.get("attention_mask", np.ones_like(ids))
        assert mask.shape == ids.shape
        chosen = ((ids + 1) * (places + 2) * mask).cumsum(axis=1)[:, -positions:] % self.vocabulary
        if self.script is not None:
            chosen = np.full_like(chosen, self.script[len(self.steps) - 1])
        return np.eye(self.vocabulary, dtype=np.float32)[chosen]

    def step_top(
        self, inputs: Mapping[str, Array], state: ToyState, top: int, *, positions: int = 1
    ) -> Sequence[Sequence[TopLogits]]:
        running = RunningTop(top)
        running.push(self.step(inputs, state, positions=positions))
        return running.result


def toy_continuation(prompt: list[int], count: int, vocabulary: int = ToyDecoder.vocabulary) -> list[int]:
    """The answer of a `ToyDecoder` to a prompt, computed without caches, batches or padding."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(sum((token + 1) * (place + 2) for place, token in enumerate(ids)) % vocabulary)
    return ids[len(prompt) :]


def files_in(directory: Path) -> ModelFiles:
    """The files of a directory whose manifest lists none."""
    return ModelFiles(directory, manifest("feature-extraction"))


def write_json(directory: Path, name: str, value: object) -> None:
    """Write a file of a model directory; in a copy of an exported one, it is no exported file any more."""
    path = directory / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))
    listing = directory / MANIFEST_NAME
    if listing.exists():
        listed = json.loads(listing.read_text())
        listed["files"] = [record for record in listed["files"] if record["path"] != name]
        listing.write_text(json.dumps(listed))


def write_bert_tokenizer(directory: Path, **settings: object) -> None:
    """A WordPiece tokenizer over `WORDS`, with leftover padding and truncation as published ones have."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from tokenizers.decoders import WordPiece

    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = WordPiece()
    tokenizer.add_special_tokens(WORDS[:5])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.enable_padding(length=7)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(directory / "tokenizer.json"))
    tokens = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    config = {"tokenizer_class": "BertTokenizer", "model_max_length": 16, "mask_token": "[MASK]", **tokens}
    write_json(directory, "tokenizer_config.json", config | settings)


def write_gpt_tokenizer(directory: Path, *, prefix_space: bool = False, **settings: object) -> None:
    """A byte-level BPE tokenizer as GPT-2 has it, trained on `CORPUS`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "GPT2TokenizerFast", "eos_token": {"__type": "AddedToken", "content": "<|endoftext|>"}}
    write_json(directory, "tokenizer_config.json", config | {"model_max_length": int(1e30)} | settings)
