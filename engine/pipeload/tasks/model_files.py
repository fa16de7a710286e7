"""The settings that a model brings along in its own JSON files.

Only the fields that a task uses are read, and their types are checked. A missing file that the manifest does not list
means defaults, because a directory made from a bare `.onnx` file has no such files.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from pipeload.errors import ConfigError, ShardError
from pipeload.foreign import foreign_errors
from pipeload.storage.model_files import ModelFiles

__all__ = [
    "MAX_NEW_TOKENS",
    "SENTENCE_FILES",
    "AddedToken",
    "GenerationConfig",
    "ModelConfig",
    "read_config",
    "read_generation_config",
    "read_sentence",
    "read_settings",
    "token_text",
]

MAX_NEW_TOKENS = 64
"""The number of tokens to generate, unless the caller or the model sets another."""

SENTENCE_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Names of the settings of sentence-transformers' module Transformer; the first that is there counts."""

_POSITIONS_AFTER_PADDING = frozenset(
    "camembert data2vec-text esm ibert longformer luke mpnet roberta xlm-roberta xlm-roberta-xl xmod".split()  # noqa: SIM905
)
"""Model types whose first position is `pad_token_id + 1`, so that the table has fewer usable rows."""

Settings = TypeVar("Settings")


class AddedToken(msgspec.Struct, frozen=True):
    """A token in a tokenizer's files, in the form that is not just its text."""

    content: str


def token_text(token: str | AddedToken) -> str:
    """The text of a token in either form."""
    return token if isinstance(token, str) else token.content


class _CrossEncoder(msgspec.Struct, frozen=True, kw_only=True):
    activation_fn: str | None = None


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of `config.json` that the tasks need.

    Attributes:
        odd: fields whose value has a form that pipeload does not know. They are as if they were not there; a task that
            needs one asks with `require`.
    """

    odd: tuple[str, ...] = ()

    model_type: str | None = None
    problem_type: str | None = None
    id2label: dict[int, str] = {}
    vocab_size: int | None = None
    max_position_embeddings: int | None = None
    n_positions: int | None = None
    original_max_position_embeddings: int | None = None
    rope_scaling: Any = None
    rope_parameters: Any = None
    pad_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    image_size: int | list[int] | None = None
    num_channels: int | None = None
    sentence_transformers: _CrossEncoder | None = None
    sbert_ce_default_activation_function: str | None = None

    def require(self, *names: str) -> None:
        """Raise ConfigError if one of the fields has a form that pipeload does not know."""
        if found := [name for name in names if name in self.odd]:
            raise ConfigError(
                f"This needs '{found[0]}' of the model's config.json, whose value has a form that pipeload does not "
                "know. Correct it in the checkpoint, and export the model again."
            )

    @property
    def pair_activation(self) -> str:
        """The class that sentence-transformers applies to the scores of pairs: `Sigmoid` where the file names none."""
        named = self.sentence_transformers.activation_fn if self.sentence_transformers else None
        return (named or self.sbert_ce_default_activation_function or "Sigmoid").rpartition(".")[2]

    @property
    def max_positions(self) -> int | None:
        """The most tokens, prompt and answer together, that the model has positions for; None if unknown."""
        self.require("max_position_embeddings", "n_positions")
        rows = self.max_position_embeddings or self.n_positions
        rope = self.rope_scaling or self.rope_parameters
        if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) == "longrope":
            # Beyond these the frequencies are others, and what the caches hold was made with the first ones.
            return self.original_max_position_embeddings or rope.get("original_max_position_embeddings") or rows
        if rows is not None and self.model_type in _POSITIONS_AFTER_PADDING:
            return rows - (self.pad_token_id if self.pad_token_id is not None else 1) - 1
        return rows

    @property
    def image_height_width(self) -> tuple[int, int] | None:
        """The size of the images that the model was built for, or None if unknown."""
        self.require("image_size")
        if self.image_size is None or self.image_size == []:
            return None
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        return self.image_size[0], self.image_size[-1]

    def label(self, index: int) -> str:
        """The name of a class; `LABEL_3`, as in transformers, if the model does not name its classes."""
        self.require("id2label")
        return self.id2label.get(index, f"LABEL_{index}")


_CONFIG_FIELDS = msgspec.structs.fields(ModelConfig)


class GenerationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of `generation_config.json` that generation uses. Names, meanings and defaults are transformers'
    own.

    A null in the file switches a setting off, as there. `max_length` counts prompt and text; `max_new_tokens` wins.

    Attributes:
        not_applied: settings of the file that would change the text and that pipeload does not know.
        names_ends: the file says which tokens end a text, all or none; otherwise `config.json` does.
    """

    not_applied: tuple[str, ...] = ()
    names_ends: bool = False

    max_length: int | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    do_sample: bool | None = False
    temperature: float | None = 1.0
    top_k: int | None = 50
    top_p: float | None = 1.0
    min_p: float | None = None
    repetition_penalty: float | None = 1.0
    no_repeat_ngram_size: int | None = 0
    stop_strings: str | list[str] | None = None
    eos_token_id: int | list[int] | None = None
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int | None = None
    num_assistant_tokens: int | None = 20

    @property
    def token_limit(self) -> int:
        """The most new tokens of a text."""
        return self.max_new_tokens or MAX_NEW_TOKENS


_NOT_APPLIED: dict[str, object] = {
    **dict.fromkeys(("num_beams", "num_beam_groups"), 1),
    **dict.fromkeys(("encoder_repetition_penalty", "guidance_scale", "typical_p"), 1.0),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "diversity_penalty"), 0.0),
    **dict.fromkeys(("min_length", "encoder_no_repeat_ngram_size"), 0),
    **dict.fromkeys(("bad_words_ids", "force_words_ids", "constraints", "sequence_bias", "watermarking_config")),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id")),
    **dict.fromkeys(("exponential_decay_length_penalty", "penalty_alpha", "dola_layers", "max_time")),
}
"""Settings of transformers that change a text -> the value with which they do not."""


def read_generation_config(files: ModelFiles) -> GenerationConfig:
    """The settings of a model directory's `generation_config.json`. Raises as `read_settings`."""
    name = "generation_config.json"
    data = files.read(name)
    if data is None:
        return GenerationConfig()
    found = _decoded(files, name, data, GenerationConfig)
    given: dict[str, Any] = _decoded(files, name, data, dict[str, Any])
    return msgspec.structs.replace(
        found,
        not_applied=tuple(key for key, off in _NOT_APPLIED.items() if given.get(key, off) not in (off, None, [], {})),
        # A file that transformers made of the config: there the config counts.
        names_ends=not given.get("_from_model_config", False),
    )


def read_config(files: ModelFiles) -> ModelConfig:
    """The fields of a model directory's `config.json`. One of an odd form stops only those who need it.

    Raises:
        ShardError: the file is not the one that was exported, cannot be read, is no JSON object, or lies outside the
            directory.
    """
    given = read_settings(files, "config.json", dict[str, Any])
    values, odd = {}, []
    for field in _CONFIG_FIELDS:
        if field.name == "odd" or field.name not in given:
            continue
        try:
            values[field.name] = msgspec.convert(_usual_form(field.name, given[field.name]), field.type, str_keys=True)
        except msgspec.ValidationError:
            odd.append(field.name)
    return ModelConfig(**values, odd=tuple(odd))


def _usual_form(name: str, value: Any) -> Any:
    """A value in the form that most files have."""
    if name == "id2label":
        names = enumerate(value) if isinstance(value, list) else (value or {}).items() if _is_object(value) else None
        return value if names is None else {key: str(label) for key, label in names}
    if name == "image_size" and _is_object(value) and value and value.keys() == {"height", "width"}:
        return [value["height"], value["width"]]
    if name == "pad_token_id" and isinstance(value, list):
        return value[0] if value else None
    return value


def _is_object(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def read_sentence(files: ModelFiles, kind: type[Settings]) -> Settings:
    """The settings of sentence-transformers' module Transformer, by any of its names. Raises as `read_settings`."""
    for name in SENTENCE_FILES:
        if (data := files.read(name)) is not None:
            return _decoded(files, name, data, kind)
    return kind()


def read_settings(files: ModelFiles, name: str, kind: type[Settings]) -> Settings:
    """The JSON file `name` of a model directory as a `kind`, or `kind()` if there is no such file.

    Raises:
        ShardError: the file is not the one that was exported, cannot be read, is no JSON, has a field of the wrong
            type, or lies outside the directory.
    """
    data = files.read(name)
    return kind() if data is None else _decoded(files, name, data, kind)


def _decoded(files: ModelFiles, name: str, data: bytes, kind: type[Settings]) -> Settings:
    with foreign_errors(ShardError, f"{files.path(name)} is damaged", "Export the model again."):
        return msgspec.json.decode(data, type=kind)
