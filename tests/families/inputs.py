"""Seeded inputs: of every length and padding that must make no difference, and across every boundary of a config."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.families.catalog import Family
from tests.families.checkpoints import image_size

Arrays = dict[str, NDArray[Any]]

_FIRST_ID = 5
"""Smaller ids are special tokens."""
_TEXTS = ((1, 7, ""), (2, 16, "right"), (3, 21, "left"), (2, 50, ""), (1, 300, ""))
"""Batch, length and side of the padding."""
_LONGEST = 600
_BOUNDARIES = {
    *("attention_chunk_size", "attention_window", "block_size", "local_attention", "local_radius"),
    *("max_position_embeddings", "max_seq_len", "n_positions", "original_max_position_embeddings", "position_buckets"),
    *("relative_attention_max_distance", "sliding_window", "window_size", "segment_means_seq_len"),
}
"""Keys of a config that name a length at which a model begins to compute otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Sizes of one set of inputs.

    Attributes:
        batch: rows.
        length: tokens, with padding.
        padding: its side; empty for none.
        scale: height and width of images, as a multiple of the config's; length of sounds likewise.
    """

    batch: int
    length: int = 7
    padding: str = ""
    scale: float = 1.0

    @property
    def name(self) -> str:
        size = "" if self.scale == 1 else f" at {self.scale:g} times the size"
        return f"{self.batch} x {self.length}{self.padding and f', padded {self.padding}'}{size}"


def boundaries(config: Any) -> list[int]:
    """Lengths at which the model begins to compute otherwise, or ends."""
    found: set[int] = set()
    waiting = [config.to_dict()]
    while waiting:
        for key, value in waiting.pop().items():
            if isinstance(value, dict):
                waiting.append(value)
            elif key in _BOUNDARIES:
                found |= {one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int)}
    return sorted(value for value in found if 1 < value < _LONGEST)


def cases(family: Family, config: Any) -> Iterator[Case]:
    """All sizes that a family is tried at."""
    if family.inputs != "text":
        yield from (Case(batch=1), Case(batch=2, length=16, padding="right"), Case(batch=3))
        yield from (Case(batch=1, scale=scale) for scale in (2, 1.5))
        return
    for batch, length, padding in _TEXTS:
        yield Case(batch=batch, length=length, padding=padding)
    for length in boundaries(config):
        for other in (length, length + 3):
            if (1, other, "") not in _TEXTS:
                yield Case(batch=1, length=other)
    # A padded batch that crosses one, too.
    if edges := [length for length in boundaries(config) if length > 16]:
        yield Case(batch=2, length=edges[0] + 5, padding="left")


def prompts(config: Any, new_tokens: int) -> list[list[int]]:
    """Prompts for greedy texts: two short ones, and some whose text crosses a boundary or ends at the last position."""
    random = np.random.default_rng(7)
    vocabulary = config.get_text_config().vocab_size
    edges = boundaries(config)
    lengths = [5, 17, *(length - 10 for length in edges[:-1] if length > 26)]
    if edges and edges[-1] > new_tokens + 17:
        lengths.append(edges[-1] - new_tokens)
    return [random.integers(_FIRST_ID, vocabulary, length).tolist() for length in dict.fromkeys(lengths)]


def make_inputs(names: list[str], case: Case, family: Family, config: Any) -> Arrays:
    """An array for each name, as the exported graph and transformers' forward both call it."""
    random = np.random.default_rng([case.batch, case.length])
    text_config = getattr(config, "text_config", None) or config
    batch, length = case.batch, case.length
    mask = np.ones((batch, length), np.int64)
    for row in range(1, batch) if case.padding else ():
        hidden = row * length // (2 * batch) + 1
        mask[row, slice(0, hidden) if case.padding == "left" else slice(length - hidden, None)] = 0
    height, width = (round(size * case.scale) for size in image_size(config))
    pad = text_config.pad_token_id or 0

    def ids() -> NDArray[Any]:
        drawn = random.integers(_FIRST_ID, text_config.vocab_size, (batch, length))
        eos = text_config.eos_token_id
        if isinstance(eos, int) and (family.task == "text-classification" or family.inputs == "image"):
            # Some models read the answer at the last token of a text, which these call its end.
            last = length - 1 - mask[:, ::-1].argmax(1)
            drawn[np.arange(batch), last] = eos
        return np.where(mask == 1, drawn, pad)

    def boxes() -> NDArray[Any]:
        corners = np.sort(random.integers(0, 1000, (batch, length, 2, 2)), axis=2)
        return corners.reshape(batch, length, 4)

    def sound() -> NDArray[Any]:
        if config.model_type == "audio-spectrogram-transformer":
            return random.standard_normal((batch, config.max_length, config.num_mel_bins))
        return random.standard_normal((batch, round(2000 * case.scale)))

    def features() -> NDArray[Any]:
        if config.model_type == "whisper":
            return random.standard_normal((batch, config.num_mel_bins, 2 * config.max_source_positions))
        return random.standard_normal((batch, round(100 * case.scale), config.input_feat_per_channel))

    def noise(*shape: int) -> NDArray[Any]:
        return random.standard_normal((batch, *shape))

    def heard() -> NDArray[Any]:
        """A mask over the text, or over the sound that the encoder takes."""
        sounds = [name for name in ("input_values", "input_features") if name in names]
        return np.ones(makers[sounds[0]]().shape[:2], np.int64) if sounds else mask

    makers = {
        "input_ids": ids,
        "inputs": ids,
        "decoder_input_ids": ids,
        "attention_mask": heard,
        "decoder_attention_mask": lambda: mask,
        "token_type_ids": lambda: random.integers(0, max(1, getattr(config, "type_vocab_size", 1)), (batch, length)),
        "position_ids": lambda: np.maximum(mask.cumsum(1) - 1, 0),
        "bbox": boxes,
        "xpath_tags_seq": lambda: random.integers(0, 200, (batch, length, config.max_depth)),
        "xpath_subs_seq": lambda: random.integers(0, 200, (batch, length, config.max_depth)),
        "visual_embeds": lambda: noise(5, config.visual_embedding_dim),
        "visual_attention_mask": lambda: np.ones((batch, 5), np.int64),
        "visual_token_type_ids": lambda: np.ones((batch, 5), np.int64),
        "pixel_values": lambda: noise(3, height, width),
        "pixel_mask": lambda: np.ones((batch, height, width), np.int64),
        "input_points": lambda: random.uniform(0, height, (batch, 1, 2, 2)),
        "input_labels": lambda: np.ones((batch, 1, 2), np.int64),
        "input_values": sound,
        "input_features": features,
        "states": lambda: noise(length, config.state_dim),
        "actions": lambda: noise(length, config.act_dim),
        "returns_to_go": lambda: noise(length, 1),
        "timesteps": lambda: np.tile(np.arange(length), (batch, 1)),
        "past_values": lambda: noise(config.context_length, config.num_input_channels),
    }
    arrays = {name: makers[name]() for name in names}
    return {name: array.astype(np.float32) if array.dtype == np.float64 else array for name, array in arrays.items()}
