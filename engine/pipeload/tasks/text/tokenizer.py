"""Texts to token ids and back, with the model directory's own `tokenizer.json`.

Ids equal those of transformers' fast tokenizers. Decoded text is exactly the text of the tokens: the
`clean_up_tokenization_spaces` of transformers, which also removes spaces that belong there, is not applied.
"""

from __future__ import annotations

import json
import threading
import warnings
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from pipeload.errors import BudgetError, ConfigError, ShardError, TruncationWarning
from pipeload.foreign import foreign_errors
from pipeload.machine.heap import trim
from pipeload.machine.sizes import format_bytes
from pipeload.pipeline.joining import Padding
from pipeload.tasks.arguments import is_whole
from pipeload.tasks.model_files import AddedToken, ModelConfig, read_sentence, read_settings, token_text
from pipeload.tasks.runner import Runner, config_of, once_per_runner
from pipeload.tasks.text.growth import check_growth
from pipeload.tasks.text.padding import Side, padded, position_ids
from pipeload.tasks.text.pairs import TextOrPair, check_text
from pipeload.tasks.text.reading import FREE_BYTES, reading_bytes

__all__ = ["Detokenizer", "Encoded", "Tokenizer", "Window", "tokenizer_of"]

_FILE = "tokenizer.json"
_MOST_BYTES = 256 << 20
_CACHED_WORDS = 100
"""The library's own 10,000 last words would take up to 80 MB, and spare a tenth of the time."""

_LONG = threading.Lock()
"""Held for a text that needs room: those of several texts would not fit together, and only one is read anyway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """One text as tokens; the arrays have one entry per token, since tuples would take ten times the memory.

    Attributes:
        ids: indices into the vocabulary.
        type_ids: the segment that the token belongs to.
        special: 1 if the tokenizer added the token (`[CLS]`, `</s>` ...), else 0.
        begins: where in the text the token comes from: the first character.
        ends: one past the last one.
        cut: whether the text has more tokens than these.
    """

    ids: array[int]
    type_ids: array[int]
    special: array[int]
    begins: array[int]
    ends: array[int]
    cut: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Window(Encoded):
    """A text and a part of another one as tokens; the arrays have one entry per token.

    Attributes:
        sequences: 0 for tokens of the first text, 1 for those of the second, -1 for special tokens.
        words: the index of the word within its text; -1 for special tokens, and where the tokenizer has no words.
    """

    sequences: array[int]
    words: array[int]


class _TokenizerConfig(msgspec.Struct, frozen=True, kw_only=True):
    tokenizer_class: str | None = None
    model_max_length: int | float | None = None
    padding_side: Side | None = None
    truncation_side: Side | None = None
    pad_token: str | AddedToken | None = None
    eos_token: str | AddedToken | None = None
    unk_token: str | AddedToken | None = None
    cls_token: str | AddedToken | None = None
    mask_token: str | AddedToken | None = None
    add_prefix_space: bool | None = False
    model_input_names: list[str] | None = None

    @property
    def usual_padding_side(self) -> Side:
        """The padding side of the transformers tokenizer class, unless a setting overrides it."""
        name = (self.tokenizer_class or "").removesuffix("Fast").removesuffix("Tokenizer")
        return "left" if name in ("CodeLlama", "Cohere", "Gemma", "Llama", "XLNet") else "right"


class _SentenceConfig(msgspec.Struct, frozen=True, kw_only=True):
    max_seq_length: int | None = None


class Tokenizer:
    """The tokenizer of one model. Safe to use from several threads, which read texts one after another.

    The library takes hundreds of bytes for each character of a text while it reads it, and keeps all other threads
    waiting. A text that is not short is read in memory of the model's budget, from which weights have given way.

    Attributes:
        most_characters: a longer text is refused; None takes any.
        max_length: texts are cut to at most this many tokens; None for text generation, where no text may be cut, and
            for tokenizers and models without a limit.
        pad_id: the id that pads shorter texts of a batch.
        unknown_id: the id for text outside the vocabulary, or None.
        eos_id: the id of the end-of-text token that the tokenizer names, or None.
        cls_id: the id of the token that stands for a whole text, or None.
        mask_id: the id of the token in place of a missing one, or None.
        padding_side: the side on which a batch is padded.
        pads_nothing: the model labels the last token, padding or not, so that each text must be a batch of its own.
    """

    def __init__(self, runner: Runner) -> None:
        config, files = config_of(runner), runner.files
        settings = read_settings(files, "tokenizer_config.json", _TokenizerConfig)
        sentence = read_sentence(files, _SentenceConfig)
        self._file = files.path(_FILE)
        self._backend = _load(runner)
        # The runner keeps the tokenizer.
        self._runner = weakref.ref(runner)
        self._reading = threading.Lock()
        self.most_characters: int | None = None
        with self._library("is damaged"):
            self._take(settings, sentence, config, runner.manifest.task)

    def _take(self, settings: _TokenizerConfig, sentence: _SentenceConfig, config: ModelConfig, task: str) -> None:
        backend = self._backend
        padding, truncation = backend.padding or {}, backend.truncation or {}
        self.padding_side: Side = settings.padding_side or padding.get("direction") or settings.usual_padding_side
        side = settings.truncation_side or truncation.get("direction", "right")
        # The lengths in tokenizer.json are left over from training; transformers ignores them as well.
        backend.no_padding()
        backend.no_truncation()
        self.max_length = None
        if task != "text-generation":
            # sentence-transformers puts its own limit in the place of the tokenizer's.
            limits = (sentence.max_seq_length or settings.model_max_length, config.max_positions)
            # Tokenizers without a limit give 1e30.
            known = [int(limit) for limit in limits if limit is not None and 0 < limit < 2**31]
            self.max_length = min(known, default=None)
        # Long texts that hold an answer become windows.
        self._cut_at = self.max_length if task != "question-answering" else None
        if self._cut_at is not None:
            backend.enable_truncation(self._cut_at, direction=side)
        _set_prefix_space(backend, settings.add_prefix_space)
        self._ids = config.vocab_size or np.iinfo(np.int32).max
        self._has_types = settings.model_input_names is None or "token_type_ids" in settings.model_input_names
        self.unknown_id = self._id(settings.unk_token)
        self.eos_id = self._id(settings.eos_token)
        self.cls_id = self._id(settings.cls_token)
        self.mask_id = self._id(settings.mask_token)
        # The graph may look for its config's id, as a decoder that labels the last token of a text does. Otherwise
        # padding is masked, so any valid id serves if a model has no padding token.
        ids = (config.pad_token_id, self._id(settings.pad_token), self.eos_id)
        self.pads_nothing = (
            task == "text-classification" and config.pad_token_id is not None and config.pad_token_id < 0
        )
        self.pad_id = next((id_ for id_ in ids if id_ is not None and id_ >= 0), 0)

    def encode(self, text: str, pair: str | None = None, *, add_special_tokens: bool = True) -> Encoded:
        """The tokens of one text, or of two with a separator, cut to `max_length`: of two texts the longer one first.

        Args:
            text: the text.
            pair: the second text, or None.
            add_special_tokens: add the special tokens that the tokenizer puts around a text or two.

        Raises:
            ConfigError: a text is no string, no valid Unicode, or too long.
            BudgetError: the memory budget has no room for reading it.
            ShardError: `tokenizer.json` has no tokens for it.
        """
        texts = (text,) if pair is None else (text, pair)
        with self._room(texts), self._library("cannot turn a text into tokens"):
            # One text at a time: encode_batch starts threads that live until the process ends.
            encoding = self._backend.encode(*texts, add_special_tokens=add_special_tokens)
            self._check_length(encoding, self._cut_at)
            return Encoded(cut=bool(encoding.overflowing), **_arrays(encoding))

    def checked_ids(self, ids: object) -> list[int]:
        """Token ids that a caller passed as a text.

        Raises:
            ConfigError: they are no list, tuple or array of ids of the vocabulary.
        """
        most = self._ids
        if not isinstance(ids, list | tuple | np.ndarray) or not all(is_whole(one, 0) and one < most for one in ids):
            raise ConfigError(f"A text must be a string, or token ids from 0 to {most - 1}, not {ids!r:.80}.")
        return [int(one) for one in ids]

    def given(self, ids: list[int]) -> Encoded:
        """A text that its caller has turned into tokens already, special ones included, cut to `max_length`.

        Args:
            ids: from `checked_ids`.
        """
        kept = array("I", ids[: self.max_length])
        none = array("I", bytes(kept.itemsize * len(kept)))
        return Encoded(ids=kept, type_ids=none, special=none, begins=none, ends=none, cut=len(ids) > len(kept))

    def windows(self, first: str, second: str, *, long: int, length: int, overlap: int) -> list[Window]:
        """Both texts, the long one in overlapping parts, each with the whole of the other one; see `encode`.

        Args:
            first: the text that comes first.
            second: the text after it.
            long: the one that is cut, 0 or 1.
            length: the most tokens of a window.
            overlap: tokens that a part shares with the part before.

        Raises:
            ConfigError: a text is no valid string or too long, or the short one leaves too little room for parts of the
                other one.
            BudgetError: the memory budget has no room for reading them.
        """
        with self._room((first, second)), self._library("cannot turn a text into tokens"):
            pair = [self._backend.encode(text, add_special_tokens=False) for text in (first, second)]
            room = length - len(pair[1 - long].ids) - self._backend.num_special_tokens_to_add(True)
            if room <= overlap < len(pair[long].ids):
                raise ConfigError(
                    f"The short text has {len(pair[1 - long].ids)} tokens, which leave {max(room, 0)} of {length} for "
                    f"the long one, and a part needs more than {overlap}. Shorten it."
                )
            pair[long].truncate(max(room, 0), stride=overlap)
            found = []
            for part in (pair[long], *pair[long].overflowing):
                parts = (pair[0], part) if long else (part, pair[1])
                encoding = self._backend.post_process(*parts)
                self._check_length(encoding, length)
                # The library's own sequence_ids get lost when a first text is cut.
                own = iter([0] * len(parts[0].ids) + [1] * len(parts[1].ids))
                sequences = array("b", (-1 if special else next(own) for special in encoding.special_tokens_mask))
                words = array("i", (-1 if word is None else word for word in encoding.word_ids))
                found.append(Window(sequences=sequences, words=words, **_arrays(encoding)))
            return found

    def encode_all(self, texts: Iterable[TextOrPair | list[int]]) -> list[Encoded]:
        """The tokens of each text or pair, as `encode` has them, or of a list of ids, as `given` has them.

        If any was cut, there is one TruncationWarning.
        """
        rows = [self._encoded(text) for text in texts]
        if any(row.cut for row in rows):
            # The same words each time, so that Python shows the warning once.
            warnings.warn(
                f"Texts with more than the {self.max_length} tokens that the model takes were cut there. "
                "Split them, so that all of it counts.",
                TruncationWarning,
                stacklevel=3,
            )
        return rows

    def batch(self, rows: Sequence[Encoded]) -> dict[str, NDArray[np.int64]]:
        """The arrays that a text model may take, `[len(rows), longest]`, padded on the padding side.

        They are `input_ids`, `attention_mask`, `token_type_ids` and `position_ids`.

        Raises:
            ConfigError: a row has no tokens.
        """
        if not all(row.ids for row in rows):
            raise ConfigError("A text has no tokens: it is empty, or the vocabulary has nothing that it holds.")
        mask = padded([array("B", b"\1" * len(row.ids)) for row in rows], fill=0, side=self.padding_side)
        return {
            "input_ids": padded([row.ids for row in rows], fill=self.pad_id, side=self.padding_side),
            "attention_mask": mask,
            # A model that is not told them takes all for zero.
            "token_type_ids": padded([row.type_ids for row in rows], fill=0, side=self.padding_side) * self._has_types,
            "position_ids": position_ids(mask),
        }

    @property
    def padding(self) -> Padding:
        """The padding of `batch`."""
        fills = {"input_ids": self.pad_id, "attention_mask": 0, "token_type_ids": 0, "position_ids": 1}
        return Padding(fills=tuple(fills.items()), left=self.padding_side == "left")

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text that the tokens spell; with or without special tokens."""
        with self._library("cannot turn tokens into a text"):
            text: str = self._backend.decode(list(ids), skip_special_tokens=not special)
            return text

    def vocabulary_digest(self) -> bytes:
        """A digest that is equal for tokenizers whose ids stand for the same tokens."""
        with self._library("has no vocabulary that can be listed"):
            known = sorted(self._backend.get_vocab(with_added_tokens=True).items())
        return sha256(repr(known).encode()).digest()

    def token(self, id_: int) -> str:
        """The vocabulary entry of an id; empty if the id has none."""
        with self._library("cannot tell a token by its id"):
            return self._backend.id_to_token(id_) or ""

    def continues_word(self, id_: int, text: str, start: int, end: int) -> bool:
        """Whether the token at `start` to `end` of a text continues the word of the token before it.

        Where the vocabulary marks such tokens (WordPiece), the mark says so; elsewhere a space between two tokens does.
        """
        with self._library("cannot tell how its words are marked"):
            if getattr(self._backend.model, "continuing_subword_prefix", None):
                return len(self.token(id_)) != end - start
            return start > 0 and " " not in text[start - 1 : start + 1]

    def join(self, tokens: Sequence[str]) -> str:
        """The text of consecutive vocabulary entries."""
        with self._library("cannot join tokens"):
            decoder = self._backend.decoder
            return " ".join(tokens) if decoder is None else str(decoder.decode(list(tokens)))

    @contextmanager
    def _room(self, texts: Sequence[str]) -> Iterator[None]:
        """The right to let the library read texts, and memory for it."""
        for text in texts:
            check_text(text)
            if self.most_characters is not None and len(text) > self.most_characters:
                raise ConfigError(
                    f"A text has {len(text)} characters, and at most {self.most_characters} are taken. Split it."
                )
        most_bytes = sum(reading_bytes(text, self._tokens) for text in texts)
        with ExitStack() as stack:
            runner = self._runner()
            if runner is not None and most_bytes > FREE_BYTES:
                stack.enter_context(_LONG)
                try:
                    stack.enter_context(runner.room_for(most_bytes))
                except BudgetError as error:
                    raise BudgetError(
                        f"A text of {sum(map(len, texts))} characters takes up to {format_bytes(most_bytes)} to read: "
                        f"split it, or make room. {error}",
                        needed_bytes=error.needed_bytes,
                        budget_bytes=error.budget_bytes,
                    ) from error
                # The heap would keep what the library has freed, in the place of weights.
                stack.callback(trim)
            stack.enter_context(self._reading)
            yield

    def _tokens(self, piece: str) -> int:
        """The tokens of a piece of a text."""
        with self._reading, self._library("cannot turn a text into tokens"):
            encoding = self._backend.encode(piece, add_special_tokens=False)
            return sum(len(part.ids) for part in (encoding, *encoding.overflowing))

    def _encoded(self, text: TextOrPair | list[int]) -> Encoded:
        if isinstance(text, list):
            return self.given(text)
        return self.encode(*text) if isinstance(text, tuple) else self.encode(text)

    def _check_length(self, encoding: Any, most: int | None) -> None:
        """The library cuts a text before its template puts it between special tokens, and perhaps more than once."""
        if most is not None and len(encoding.ids) > most:
            raise ShardError(
                f"{self._file} makes {len(encoding.ids)} tokens of a text that was cut to {most}: its template has the "
                "text more than once. Export the model again."
            )

    def _library(self, fact: str) -> AbstractContextManager[None]:
        """Wraps each use of the library, which trusts its file and raises errors of any type, panics included."""
        return foreign_errors(ShardError, f"{self._file} {fact}", "Export the model again.")

    def _id(self, token: str | AddedToken | None) -> int | None:
        if token is None:
            return None
        id_: int | None = self._backend.token_to_id(token_text(token))
        return id_


def _arrays(encoding: Any) -> dict[str, Any]:
    # One after another: the library makes Python's objects of each.
    offsets = encoding.offsets
    begins, ends = (array("I", (place[side] for place in offsets)) for side in (0, 1))
    del offsets
    return {
        "ids": array("I", encoding.ids),
        "type_ids": array("I", encoding.type_ids),
        "special": array("I", encoding.special_tokens_mask),
        "begins": begins,
        "ends": ends,
    }


_CONTEXT = 8
"""Tokens before a text that say whether it begins with a space."""

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""The decoded text of bytes that do not form a complete character yet."""


class Detokenizer:
    """The text of a growing sequence, in pieces that can be shown immediately.

    A piece is held back while it ends inside a character: byte-level tokens may carry a part of one. The
    pieces together are the text of the whole sequence.

    Args:
        tokenizer: decodes.
        before: the tokens that the sequence continues; with them, the first piece begins with a space if the text does.
        special: whether special tokens are part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = (), *, special: bool = False) -> None:
        self._decode = partial(tokenizer.decode, special=special)
        self._ids: list[int] = []
        self._shown: list[int] = list(before)[-_CONTEXT:]

    def push(self, id_: int) -> str:
        """The text that this token completes; empty if it completes no character."""
        self._ids.append(id_)
        piece = self._rest()
        if not piece or piece.endswith(_UNFINISHED):
            return ""
        return self._show(piece)

    @property
    def held(self) -> str:
        """The text held back, without the incomplete character."""
        return self._rest().rstrip(_UNFINISHED)

    def flush(self) -> str:
        """The text still held back at the end of the sequence."""
        return self._show(self._rest())

    def _rest(self) -> str:
        # Decoded together with the tokens of the last piece, because some decoders treat the first token of a text
        # specially (they drop its leading space).
        return self._decode(self._shown + self._ids)[len(self._decode(self._shown)) :]

    def _show(self, piece: str) -> str:
        self._shown, self._ids = self._ids or self._shown, []
        return piece


@once_per_runner
def tokenizer_of(runner: Runner) -> Tokenizer:
    """The model's tokenizer, loaded at the first call.

    Raises:
        ConfigError: the model has none, or the tokenizers library is not installed.
        ShardError: one of its files is damaged, or lets a text grow without limit.
    """
    tokenizer = Tokenizer(runner)
    # Parsing leaves several times the file's size on the heap, memory that the budget can use better.
    trim()
    return tokenizer


def _load(runner: Runner) -> Any:
    data = runner.files.read(_FILE, most_bytes=_MOST_BYTES)
    if data is None:
        raise ConfigError(
            f"{runner.directory} has no tokenizer.json, so texts cannot be turned into tokens. Pass token ids "
            "instead (to model.run, or as the prompt of model.generate), or put the file there."
        )
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError("Texts need the tokenizers library: pip install tokenizers.") from error
    path = runner.files.path(_FILE)
    check_growth(data, str(path))
    with foreign_errors(ShardError, f"{path} is damaged", "Export the model again."):
        made = tokenizers.Tokenizer.from_buffer(data)
        if hasattr(made.model, "_resize_cache"):
            made.model._resize_cache(_CACHED_WORDS)
        return made


def _set_prefix_space(backend: Any, wanted: bool | None) -> None:
    """Let tokenizer_config.json decide whether a text begins with a space, as transformers does."""
    if wanted is None or backend.pre_tokenizer is None:
        return
    state = json.loads(backend.pre_tokenizer.__getstate__())
    if state.get("add_prefix_space", wanted) != wanted:
        backend.pre_tokenizer.add_prefix_space = wanted
