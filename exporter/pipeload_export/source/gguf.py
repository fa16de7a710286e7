"""What a GGUF file says and transformers does not read: applied here, or refused by name.

transformers takes the tensors and keys that it knows and drops the others without a word, makes every byte-level
tokenizer split words as GPT-2 does, and adds a first token where the file says that there is none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeload_export.source.config_keys import knows
from pipeload_export.source.refused import Refused

__all__ = ["GgufFile", "QuantisedTensor", "quantised_tensors", "reading_once"]

_FACTORS = "rope_freqs.weight"
_READ_BY_PROCESSORS = ("_exps.", ".ssm_", ".shortconv.")
"""Parts of the names of tensors that transformers reads otherwise than by its table of names."""
_OF_THE_FILE = ("tensor_data_layout", "vocab_size", "context_length", "rope.scaling.finetuned")
_MOST_NAMES = 4
_PLAIN = ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")

_LLAMA3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_SPLITS: dict[str | None, str] = {
    **dict.fromkeys((None, "default", "gpt-2", "phi-2", "mpt", "olmo", "jais"), "words"),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), "digits"),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"), _CONTRACTIONS + _LLAMA3),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen"), _CONTRACTIONS + _LLAMA3.replace("{1,3}", "")),
}
"""`tokenizer.ggml.pre` -> how a byte-level tokenizer cuts a text into words, as llama.cpp does it."""
_WITH_FIRST_TOKEN = ("llama-bpe", "llama3", "llama-v3")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantisedTensor:
    """A tensor of a GGUF file that is no plain floats.

    Attributes:
        name: in the file.
        kind: GGUF's name of its type, such as "Q4_1".
        columns: values of a row.
        rows: `[rows, bytes]`, a view of the file; those of several matrices, one below another.
    """

    name: str
    kind: str
    columns: int
    rows: NDArray[np.uint8]

    def floats(self, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The values of some of its rows, as transformers has them."""
        from gguf import GGMLQuantizationType, dequantize

        made: NDArray[np.float32] = dequantize(rows, GGMLQuantizationType[self.kind])
        return made


def quantised_tensors(path: Path) -> list[QuantisedTensor]:
    """The quantised matrices of a GGUF file, in its order."""
    from gguf import GGUFReader

    return [
        QuantisedTensor(
            name=tensor.name,
            kind=tensor.tensor_type.name,
            columns=int(tensor.shape[0]),
            rows=tensor.data.reshape(-1, tensor.data.shape[-1]),
        )
        for tensor in GGUFReader(str(path)).tensors
        if tensor.tensor_type.name not in _PLAIN and len(tensor.shape) > 1
    ]


@contextmanager
def reading_once() -> Iterator[None]:
    """A context in which each GGUF file is parsed once: transformers does it for the config, the tokenizer and the
    tensors in turn, and makes its table of names anew for each module, which takes longer than the tracing.
    """
    import gguf

    before = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = (cache(function) for function in before)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = before


class GgufFile:
    """The keys and tensors of one GGUF file.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self._reader = GGUFReader(str(path))
        self._architecture = str(self._key("general.architecture"))

    def configure(self, config: Any) -> None:
        """Put into the config what transformers leaves out.

        Raises:
            Refused: a key may change an answer, and the config has no place for it.
        """
        from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

        if int(self._key("split.count") or 1) > 1:
            raise Refused("the file is one part of several. Join them with llama-gguf-split --merge.")
        prefix = f"{self._architecture}."
        left = {key.removeprefix(prefix): self._key(key) for key in self._reader.fields if key.startswith(prefix)}
        for key in (*GGUF_CONFIG_MAPPING.get(self._architecture, {}), *_OF_THE_FILE):
            left.pop(key, None)
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rotary = int(head * getattr(config, "partial_rotary_factor", 1.0))
        for key, size in (
            ("attention.key_length", head),
            ("attention.value_length", head),
            ("rope.dimension_count", rotary),
        ):
            if left.get(key) == size:
                del left[key]
        self._take_scaling(left, config)
        if kept := {key: value for key, value in left.items() if value not in (0, None, False, "none", "")}:
            shown = ", ".join(f"{prefix}{key} = {value!r:.40}" for key, value in list(kept.items())[:_MOST_NAMES])
            raise Refused(
                f"the file has {len(kept)} key{'s' * (len(kept) > 1)} that transformers does not read: {shown}. The "
                "answers would be others than llama.cpp's. Export the checkpoint that the file was made from."
            )

    def apply(self, model: Any) -> None:
        """Give the model the tensors that transformers leaves out, once it has the others.

        Raises:
            Refused: the model has no place for one.
        """
        from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

        placed = get_gguf_hf_weights_map(model)
        rotary = getattr(model.base_model, "rotary_emb", None)
        left = []
        for tensor in self._reader.tensors:
            if tensor.name in placed or any(part in tensor.name for part in _READ_BY_PROCESSORS):
                continue
            if tensor.name == _FACTORS and rotary is not None and len(rotary.inv_freq) == tensor.n_elements:
                # A factor for each frequency: that is how llama.cpp stores the rope of Llama 3.
                rotary.inv_freq /= rotary.inv_freq.new_tensor(tensor.data.copy())
            else:
                left.append(tensor.name)
        if left:
            raise Refused(
                f"the file has {len(left)} tensor{'s' * (len(left) > 1)} that {type(model).__name__} of transformers "
                f"has no place for: {', '.join(left[:_MOST_NAMES])}. The answers would be others than llama.cpp's. "
                "Export the checkpoint that the file was made from."
            )

    def complete_tokenizer(self, tokenizer: Any) -> Any:
        """The tokenizer that transformers made of the file, with what the file says of words and special tokens.

        Raises:
            Refused: it cuts a text into words in a way that pipeload does not know.
        """
        from tokenizers import AddedToken, decoders

        tokens = [str(token) for token in self._key("tokenizer.ggml.tokens")]
        backend = tokenizer.backend_tokenizer
        for kind in ("bos", "eos"):
            id_ = self._key(f"tokenizer.ggml.{kind}_token_id")
            setattr(tokenizer, f"{kind}_token", None if id_ is None else tokens[int(id_)])
        kinds: Sequence[int] = self._key("tokenizer.ggml.token_type") or ()
        defined = [token for token, kind in zip(tokens, kinds, strict=False) if kind == 4]  # user-defined
        backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in defined])
        pre, is_words = self._key("tokenizer.ggml.pre"), self._key("tokenizer.ggml.model") == "gpt2"
        if is_words:
            if pre not in _SPLITS:
                raise Refused(
                    f"its tokenizer cuts texts into words by the rules of '{pre}' (tokenizer.ggml.pre), which pipeload "
                    "does not know. Export the checkpoint that the file was made from."
                )
            backend.pre_tokenizer = _splitter(_SPLITS[pre])
            backend.decoder = decoders.ByteLevel()
            backend.model.ignore_merges = pre in _WITH_FIRST_TOKEN
        first, last = self._key("tokenizer.ggml.add_bos_token"), self._key("tokenizer.ggml.add_eos_token")
        if first is None:
            first = not is_words or pre in _WITH_FIRST_TOKEN  # as llama.cpp decides
        _set_ends(tokenizer, first=bool(first), last=bool(last))
        return tokenizer

    def _take_scaling(self, left: dict[str, Any], config: Any) -> None:
        kind = left.get("rope.scaling.type") or ("linear" if "rope.scale_linear" in left else None)
        if kind not in ("linear", "yarn") or not knows(type(config), "rope_scaling"):
            return
        factor = left.pop("rope.scaling.factor", None) or left.pop("rope.scale_linear", None)
        if not factor:
            return
        left.pop("rope.scaling.type", None)
        config.rope_scaling = {"rope_type": kind, "factor": float(factor)}
        if original := left.pop("rope.scaling.original_context_length", None):
            config.rope_scaling["original_max_position_embeddings"] = int(original)

    def _key(self, name: str) -> Any:
        field = self._reader.fields.get(name)
        return None if field is None else field.contents()


def _splitter(split: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in ("words", "digits"))
    if split == "words":
        return words
    first = (
        pre_tokenizers.Digits(individual_digits=True)
        if split == "digits"
        else pre_tokenizers.Split(Regex(split), "isolated")
    )
    return pre_tokenizers.Sequence([first, words])


def _set_ends(tokenizer: Any, *, first: bool, last: bool) -> None:
    """Let a text begin and end with special tokens, or not."""
    from tokenizers import processors

    for name, wanted in (("add_bos_token", first), ("add_eos_token", last)):
        if hasattr(tokenizer, name):
            setattr(tokenizer, name, wanted)
    ends = [(token, wanted) for token, wanted in ((tokenizer.bos_token, first), (tokenizer.eos_token, last))]
    before, after = ([token] if token and wanted else [] for token, wanted in ends)
    used = dict.fromkeys([*before, *after])

    def template(text: str, type_id: int) -> Iterator[str]:
        yield from (f"{token}:{type_id}" for token in before)
        yield f"${text}:{type_id}"
        yield from (f"{token}:{type_id}" for token in after)

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=list(template("A", 0)),
        pair=[*template("A", 0), *template("B", 1)],
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in used],
    )
