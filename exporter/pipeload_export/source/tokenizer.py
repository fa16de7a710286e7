"""The tokenizer of a checkpoint, as transformers makes it of all its files, in the form that the engine reads.

tokenizer_config.json overrides tokenizer.json (lower case, accents, special tokens around a text, added tokens ...),
and a checkpoint may have neither, only a vocabulary. What is exported is the *resolved* tokenizer, and only after the
engine's own code has made the same ids of a corpus in many scripts as transformers does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeload.errors import PipeloadError
from pipeload.foreign import foreign_errors
from pipeload.tasks.text.tokenizer import Tokenizer
from pipeload_export.source.bare import files_only
from pipeload_export.source.folder import read_json
from pipeload_export.source.refused import Refused, only_trusted_code
from pipeload_export.source.tracing import RESOLVED

__all__ = ["TOKENIZER_FILES", "resolve_tokenizer"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
"""Files of which transformers makes a tokenizer: any of them is enough."""
_CORPUS = Path(__file__).with_name("corpus.json")
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MOST_SPECIAL = 64
_SHOWN = 60


def resolve_tokenizer(checkpoint: Path, graph_folder: Path, *, trust_remote_code: bool = False) -> None:
    """Write the resolved tokenizer of a checkpoint into `graph_folder / RESOLVED`; nothing if it has none.

    Raises:
        Refused: transformers cannot open it, or the engine would make other ids of a text.
    """
    if not any((checkpoint / name).is_file() for name in TOKENIZER_FILES):
        return
    reference = _reference(checkpoint, trust_remote_code=trust_remote_code)
    fast = reference
    if not reference.is_fast:
        if not (checkpoint / "tokenizer.json").is_file():
            return  # no library but transformers can run it; the engine says that there is no tokenizer.json
        from transformers import PreTrainedTokenizerFast

        fast = PreTrainedTokenizerFast.from_pretrained(checkpoint, local_files_only=True)
    folder = graph_folder / RESOLVED
    folder.mkdir(exist_ok=True)
    settings = read_json(checkpoint / "tokenizer_config.json")
    settings.pop("add_prefix_space", None)  # it is in the tokenizer.json that is written here
    settings |= {
        "tokenizer_class": settings.get("tokenizer_class") or type(reference).__name__,
        "model_max_length": reference.model_max_length,
        "padding_side": reference.padding_side,
        "truncation_side": reference.truncation_side,
        **{name: None if (token := getattr(reference, name)) is None else str(token) for name in _NAMES},
    }
    (folder / "tokenizer.json").write_text(fast.backend_tokenizer.to_str(), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")
    _compare(folder, reference)


def _reference(checkpoint: Path, *, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    config, settings = (read_json(checkpoint / name) for name in ("config.json", "tokenizer_config.json"))
    named = settings.get("tokenizer_class") or settings.get("auto_map") or config.get("tokenizer_class")
    kind = AutoTokenizer if named or config.get("model_type") in TOKENIZER_MAPPING_NAMES else PreTrainedTokenizerFast
    # Where trust is neither given nor denied, transformers asks at the terminal.
    options = {"trust_remote_code": trust_remote_code, "local_files_only": not trust_remote_code}
    with foreign_errors(
        Refused,
        "transformers cannot open its tokenizer",
        "Fetch its files again, or take them out of the folder to export a model that takes token ids only.",
    ):
        with only_trusted_code():
            return kind.from_pretrained(checkpoint, **options)


def _compare(folder: Path, reference: Any) -> None:
    # For text generation no text is cut.
    try:
        own = Tokenizer(files_only(folder, "text-generation"))
        for text in _texts(reference):
            expected, found = list(reference(text).input_ids), list(own.encode(text).ids)
            if expected != found:
                at = next((n for n, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), 0)
                raise Refused(
                    f"pipeload would make other tokens of {text[:_SHOWN]!r} than transformers does: from token {at} on "
                    f"{found[at : at + 4]} instead of {expected[at : at + 4]}. Please report the model, and take its "
                    "tokenizer files out of the folder to export a model that takes token ids only."
                )
    except PipeloadError as error:
        raise Refused(f"the engine cannot use its tokenizer: {error}") from error


def _texts(reference: Any) -> Iterator[str]:
    """The corpus in pieces and as one text, and the tokenizer's special tokens inside of texts."""
    corpus: list[str] = json.loads(_CORPUS.read_bytes())
    yield from corpus
    yield "\n".join(corpus)
    special = [*reference.all_special_tokens, *map(str, reference.added_tokens_decoder.values())]
    for token in list(dict.fromkeys(special))[:_MOST_SPECIAL]:
        yield f"one {token} two{token}three {token}{token}\n{token}"
