"""The parts of `pipeload.json`: a record for each kind of entry.

The modules beside this one import them from here, all others from `pipeload.format.manifest`, which lists their names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

from pipeload.format.dtypes import ITEM_BYTES, WIDE

FORMAT_VERSION = 1
PAGE_BYTES = 4096
"""Alignment of the data part of a weights file, and of every range that is read to load a shard."""

LENGTH_AXIS = 2
"""Of a cache that is written in place: `[batch, heads, tokens, size]`."""

Role = Literal["prologue", "block", "epilogue", "head"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A graph input, a graph output or an edge.

    Attributes:
        name: its name in the unsplit graph, in the shards' graphs and in `model.run`.
        dtype: NumPy's name of the element type.
        shape: an int where the dimension is fixed, a string where it is not: a symbol (`"batch_size"`) or a
            sum of symbols and ints (`"past_sequence_length + sequence_length"`). For an edge whose rank is
            not known, empty.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSpec:
    """One tensor in a weights file.

    Attributes:
        name: its name in the file and in the shard's graph.
        dtype: its type in the file.
        shape: its dimensions.
        offset: its first byte, counted from the start of the file.
        widened: of a tensor that is stored in 16 bits and used in float32: the name of the tensor that the graph makes
            of it with a `Cast`. The engine does that instead, while it loads the shard. None: it is used as it is.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    widened: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor occupies in its file."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def memory_dtype(self) -> str:
        """Its type in memory while its shard runs."""
        return self.dtype if self.widened is None else WIDE

    @property
    def memory_bytes(self) -> int:
        """Bytes that it occupies in memory while its shard runs."""
        return prod(self.shape) * ITEM_BYTES[self.memory_dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """One file of the model directory.

    Attributes:
        path: below the directory, with slashes.
        nbytes: its size.
        sha256: of its bytes.
        ranges_apart: the sha256 leaves out the bytes that lie in `WeightsRange`s of the shards, which have their own.
            False in older directories.
    """

    path: str
    nbytes: int
    sha256: str
    ranges_apart: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsRange:
    """The one contiguous range of a weights file that is read to load a shard.

    Attributes:
        path: the weights file; several head slices share one.
        offset: first byte; a multiple of `PAGE_BYTES`, so that direct I/O can read it.
        nbytes: length; the end need not be aligned.
        sha256: of just these bytes, so that a loader can check the bytes that it read.
    """

    path: str
    offset: int
    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """Rows of a table that the engine reads from the weights file, instead of loading the table.

    Equals `Gather(table, indices, axis=0)`: the edge `output` has the shape of `indices` followed by
    `table.shape[1:]`. Negative indices count from the end, as in ONNX. Rows of a table that is `widened` are float32.

    Attributes:
        path: the table's file.
        table: the table.
        indices: the graph input or edge with the rows that are wanted.
        output: the edge that holds them.
        parts: where the rows do not lie one behind the other from the table's offset on: the tensors of the file that
            hold them, in order. The shape of a row may be another one there.
    """

    path: str
    table: WeightSpec
    indices: str
    output: str
    parts: tuple[WeightSpec, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One piece of the model that is loaded, run and freed as a whole.

    Attributes:
        name: `prologue`, `block.000`, `epilogue`, `head.000` ...
        role: its part in the model.
        graph: the `.onnx` file.
        weights: the range that a loader reads; None for a graph without large initializers.
        tensors: the initializers that lie in that range.
        inputs: edges and graph inputs that it takes, in the order of its graph.
        outputs: edges and graph outputs that it makes.
        lookups: rows that the engine fetches before it runs the shard.
        packed: its sessions are packed (weights laid out for the CPU) wherever it is loaded: kernels for weights of few
            bits (MatMulNBits) round otherwise, and take many times as long, when they are not. False in older
            directories.
        structure: id of its structure; shards of one structure have the same graph up to names and weights, and
            inputs of the same shapes. In older directories the shapes may differ, and the bound is above all of them.
    """

    name: str
    role: Role
    graph: FileRecord
    weights: WeightsRange | None
    tensors: tuple[WeightSpec, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    lookups: tuple[Lookup, ...] = ()
    packed: bool = False
    structure: str

    @property
    def nbytes(self) -> int:
        """Bytes of weights that are read to load the shard."""
        return self.weights.nbytes if self.weights else 0

    @property
    def widens(self) -> bool:
        """Whether any of its tensors is widened as it is loaded."""
        return any(spec.widened is not None for spec in self.tensors)

    @property
    def memory_bytes(self) -> int:
        """Bytes that its weights occupy in memory while it runs."""
        return self.nbytes + sum(spec.memory_bytes - spec.nbytes for spec in self.tensors)


def first_places(shards: Sequence[Shard]) -> list[int]:
    """For each shard, the place of the first one whose weights are the same range of the same file: often its own."""
    first: dict[WeightsRange, int] = {}
    return [first.setdefault(s.weights, place) if s.weights else place for place, s in enumerate(shards)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteTerm:
    """`nbytes` times the product of the named dimensions (a name may occur twice; none means a constant).

    Attributes:
        nbytes: the factor.
        dims: the dimensions.
        steps: for each dimension, how many of it count as one, a part of that as a whole one: the pixels of a patch,
            the samples of an audio frame. Empty where all count by themselves.
    """

    nbytes: int
    dims: tuple[str, ...] = ()
    steps: tuple[int, ...] = ()

    def evaluate(self, sizes: Mapping[str, int]) -> int:
        """The term's bytes for the given sizes of the dimensions."""
        steps = self.steps or (1,) * len(self.dims)
        return self.nbytes * prod(-(-sizes[dim] // step) for dim, step in zip(self.dims, steps, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """The properties that shards of one structure share.

    Attributes:
        activations: upper bound of the intermediate tensors that are alive together while the shard runs,
            outputs included and inputs not: the maximum over the formulas of the sum of the formula's terms.
    """

    activations: tuple[tuple[ByteTerm, ...], ...]

    def activation_bytes(self, dims: Mapping[str, int]) -> int:
        """The bound in bytes for the given sizes of the model's symbolic dimensions."""
        return max(
            (sum(term.evaluate(dims) for term in formula) for formula in self.activations),
            default=0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """A pair of a graph input and the graph output that takes its place at the next step (KV cache).

    Attributes:
        input: its name in the graph.
        output: its name in the graph.
        in_place: the shard writes the new tokens into the cache that it gets. `[batch, heads, tokens, size]`; the
            input must have room for the new tokens, and may have more; the output has the input's size. Otherwise the
            shard makes a longer copy.
        scale: of a cache of int8, the input of the cache that holds its scales, `[batch, heads, tokens, 1]`: the
            model's cache is their product.
    """

    input: str
    output: str
    in_place: bool = False
    scale: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A language-model head that was cut along the vocabulary.

    `output` is the concatenation along the last axis of the first outputs of `shards`, in that order. Every
    one of them takes the edge `input`, and treats each position on its own, so that a caller who needs only
    the last position may pass only that.
    """

    input: str
    output: str
    shards: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The exporter's findings when it compared the chain of shards with the unsplit graph."""

    output: str
    max_abs_error: float
    max_rel_error: float
    limit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Vectors:
    """The exporter's findings when it compared the vectors of `embed` with those of sentence-transformers.

    Attributes:
        cases: the texts that were compared: how many, and with which prompt.
        longest: tokens of the longest of them, as the model takes it.
        cut: whether that one has more tokens than the model takes.
        difference: the difference that came closest to its limit, in parts of the range of all vectors.
    """

    cases: tuple[str, ...]
    longest: int
    cut: bool
    difference: Verification


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """The exporter's findings when it compared the streamed model with its source, transformers' eager model.

    Attributes:
        cases: the inputs that were compared: batch, length, padding; and the texts that were continued greedily.
        longest: tokens of the longest of them; 0 for inputs without a length.
        beyond: lengths at which the config lets the model change, and that were too long to be compared.
        outputs: for each output the difference that came closest to its limit.
        tokens: greedy tokens of the source.
        tokens_equal: those of them that the streamed model chooses too; at the others two logits are as good as equal.
        versions: library -> version.
        vectors: of a checkpoint of sentence-transformers; None where vectors were not compared.
    """

    cases: tuple[str, ...]
    longest: int
    beyond: tuple[int, ...] = ()
    outputs: tuple[Verification, ...]
    tokens: int = 0
    tokens_equal: int = 0
    versions: dict[str, str]
    vectors: Vectors | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputError:
    """How far an output is from the source's: worst and mean of all values, and the worst in parts of its range."""

    output: str
    max_abs_error: float
    mean_abs_error: float
    max_rel_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardError:
    """What rounding one shard's weights does to its outputs, when it takes what the source's shards before it make.

    Both numbers are of the output that is furthest off, in parts of its range.

    Attributes:
        shard: its name, or "head" for all slices of a head.
        max_rel_error: the worst of all values.
        mean_rel_error: the mean of all values.
    """

    shard: str
    max_rel_error: float
    mean_rel_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """The exporter's findings when it compared a model with rounded weights with its source.

    Attributes:
        inputs: what both answered.
        outputs: the error of each output of floats.
        cosine: of a model for embeddings, between its embedding of a text and the source's; the worst of all texts.
        top1: of a model with logits, how often the first choice is the source's, in parts of one.
        perplexity: of a decoder, over the passage that the exporter brings along.
        source_perplexity: the source's over the same.
        shards: each shard's own error, in their order; empty for blocks of a GGUF file, and in older directories.
    """

    inputs: tuple[str, ...]
    outputs: tuple[OutputError, ...]
    cosine: float | None = None
    top1: float | None = None
    perplexity: float | None = None
    source_perplexity: float | None = None
    shards: tuple[ShardError, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallWeights:
    """Weights of fewer bits than the source's floats: how the exporter rounded them, or those of a GGUF file as it is.

    Attributes:
        dtype: "bfloat16" or "float16": large tensors of float32 were rounded to this type; None where the weights of
            products and tables have blocks of few bits.
        bits: of each weight of most products: 8 or 4; or 16. Of a GGUF file's, the least.
        fine_bits: of tables, products that are tied to one, and products that narrow: they make at most half as many
            values as they sum over. Of a GGUF file's, the most.
        block_size: weights that have one scale; of a GGUF file's, the least.
        symmetric: zero lies in the middle of each block's range; else blocks of products have a zero of their own.
        accuracy: what that did to the answers; None where it was not measured.
        gguf: type of a GGUF file, such as "Q4_1", -> weights that have the file's own blocks of that type. Empty where
            the exporter rounded.
        floats: names of the file's quantised tensors that are kept as floats.
        integers: products multiply integers: weights with a scale for each output in place of blocks, and activations
            of 14 bits, each row with a scale of its own. Only tables, and products that are tied to one, have blocks.
        kept: shards that are wider, or "head" for all slices of a head -> "fp32", the source's weights, or "int8".
    """

    dtype: str | None = None
    bits: int
    fine_bits: int
    block_size: int
    symmetric: bool
    accuracy: Accuracy | None = None
    gguf: Mapping[str, int] = field(default_factory=dict)
    floats: tuple[str, ...] = ()
    integers: bool = False
    kept: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A copy of the model with fewer bits, in the same directory, which guesses tokens for it.

    Attributes:
        path: its folder, a sharded model directory of its own; `files` lists everything in it.
        nbytes: of its weights.
        top1: how often its first choice is the source's, in parts of one; None where that was not measured.
    """

    path: str
    nbytes: int
    top1: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeChange:
    """Longer texts have other rotary frequencies, in all their positions.

    Attributes:
        tokens: the longest text with the first frequencies.
        keeps_caches: whether the source goes on with caches that were made with other frequencies (dynamic rope), or
            computes the text anew (longrope).
    """

    tokens: int
    keeps_caches: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything that the engine knows of a model before it opens a shard; `manifest.py` tells how the parts fit.

    Attributes:
        quantised_dynamically: an activation is quantised with one scale for the whole tensor, chosen while it runs, so
            a text's answers depend on what is computed together with it.
        takes_left_padding: the model answers for a text that is padded on the left, behind a mask, as it does for the
            text alone; None where this was not tried.
        rope_change: where the rotary frequencies depend on the length of a text; None where they do not.
        small_weights: how the exporter rounded weights; None where they are the source's.
        draft: a copy with fewer bits that guesses tokens; None where there is none.
    """

    format: int = FORMAT_VERSION
    exporter: str
    source: str
    model_type: str
    task: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    edges: tuple[TensorSpec, ...]
    caches: tuple[Cache, ...] = ()
    head: Head | None = None
    shards: tuple[Shard, ...]
    structures: dict[str, Structure]
    files: tuple[FileRecord, ...]
    verification: tuple[Verification, ...] = ()
    parity: Parity | None = None
    dims: tuple[str, ...] = field(default=())
    missing_weights: tuple[str, ...] = ()
    unused_weights: tuple[str, ...] = ()
    quantised_dynamically: bool = False
    takes_left_padding: bool | None = None
    rope_change: RopeChange | None = None
    small_weights: SmallWeights | None = None
    draft: Draft | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of all shards' weights, those that shards have in common once (tables read by row not included)."""
        places = enumerate(first_places(self.shards))
        return sum(self.shards[place].nbytes for place, first in places if place == first)

    @property
    def cache_inputs(self) -> frozenset[str]:
        """Names of the graph inputs that are caches."""
        return frozenset(cache.input for cache in self.caches)

    @property
    def cache_outputs(self) -> frozenset[str]:
        """Names of the graph outputs that are caches."""
        return frozenset(cache.output for cache in self.caches)

    @property
    def free_inputs(self) -> tuple[TensorSpec, ...]:
        """The graph inputs that are no caches, in the order of the graph."""
        caches = self.cache_inputs
        return tuple(spec for spec in self.inputs if spec.name not in caches)

    @property
    def free_outputs(self) -> tuple[TensorSpec, ...]:
        """The graph outputs that are no caches, in the order of the graph."""
        caches = self.cache_outputs
        return tuple(spec for spec in self.outputs if spec.name not in caches)
