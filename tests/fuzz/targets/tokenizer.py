"""`tokenizer.json`: rules that come with a model, for a library that trusts them."""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path

from tests.engine.tasks.fakes import CORPUS, WORDS, write_bert_tokenizer
from tests.engine.tasks.fakes import manifest as text_manifest
from tests.fuzz.mutations import json_of
from tests.fuzz.target import Target, Trial, Wrong
from tests.fuzz.targets.settings import InMemory

from pipeload.tasks.runner import FilesOnly
from pipeload.tasks.text.growth import check_growth
from pipeload.tasks.text.tokenizer import Detokenizer, Tokenizer

_TEXTS = (*CORPUS, "", "the cat sat on the mat in paris", "a" * 300, "\u0130\ufdfa x\ufffd", "[CLS] [MASK] <s>")
_LONG = "the cat's 12345 mat, " * 40


def _seeds() -> list[bytes]:
    """A tokenizer of each kind of model and of most rules, each with few words."""
    import tokenizers
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

    with tempfile.TemporaryDirectory() as folder:
        write_bert_tokenizer(Path(folder))
        made = [json.loads((Path(folder) / "tokenizer.json").read_bytes())]
    pieces = {word: number for number, word in enumerate(["<s>", "at", *WORDS[6:12], *"abcdehimnost\u0120\u2581"])}
    byte_level = tokenizers.Tokenizer(models.BPE(pieces, [("o", "n"), ("a", "t")], unk_token="<s>", fuse_unk=True))
    byte_level.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{N}{1,3}|[^\s\p{L}\p{N}]+|\s+"), "isolated"), pre_tokenizers.ByteLevel()]
    )
    byte_level.decoder = decoders.ByteLevel()
    byte_level.post_processor = processors.ByteLevel(trim_offsets=False)
    byte_level.add_special_tokens([AddedToken("<s>", lstrip=True)])
    unigram = tokenizers.Tokenizer(models.Unigram([("<s>", 0.0), *((word, -1.0) for word in pieces)], unk_id=0))
    unigram.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " "), normalizers.Prepend("\u2581")]
    )
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    words = tokenizers.Tokenizer(models.WordLevel(pieces, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    words.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.StripAccents(), normalizers.Strip()])
    words.post_processor = processors.BertProcessing(("</s>", 1), ("<s>", 0))
    return [json.dumps(one).encode() for one in made] + [one.to_str().encode() for one in (byte_level, unigram, words)]


def _prepare_rules() -> Trial:
    def trial(data: bytes) -> bool:
        check_growth(data, "tokenizer.json")
        return True

    return trial


def _prepare() -> Trial:
    warnings.simplefilter("ignore")
    manifest = text_manifest("feature-extraction")

    def trial(data: bytes) -> bool:
        files = InMemory({"tokenizer.json": data, "tokenizer_config.json": b'{"model_max_length":64}'}, manifest)
        tokenizer = Tokenizer(FilesOnly(Path("/fuzz"), manifest, files))
        for text in _TEXTS:
            found = tokenizer.encode(text)
            if len({len(one) for one in (found.ids, found.begins, found.ends, found.type_ids, found.special)}) > 1:
                raise Wrong("a token lacks its place or kind", text)
            places = [*zip(found.begins, found.ends, strict=True)]
            if any(not 0 <= begin <= end <= len(text) for begin, end in places):
                raise Wrong("a token lies outside of its text", (text, places))
            if len(found.ids) > 64:
                raise Wrong("a text is longer than the model takes", text)
            tokenizer.decode(found.ids)
            detokenizer = Detokenizer(tokenizer)
            for id_ in found.ids[:8]:
                detokenizer.push(id_)
            detokenizer.flush()
        tokenizer.encode(_LONG, _TEXTS[0])
        tokenizer.windows(_TEXTS[0], _LONG, long=1, length=60, overlap=8)
        tokenizer.batch([one for one in tokenizer.encode_all([*_TEXTS, (_TEXTS[0], _TEXTS[1])]) if one.ids])
        tokenizer.join([tokenizer.token(id_) for id_ in range(4)])
        tokenizer.vocabulary_digest()
        return True

    return trial


TARGETS = (
    Target(
        name="tokenizer_rules", what="rules of `tokenizer.json`", prepare=_prepare_rules, mutate=json_of, seeds=_seeds
    ),
    Target(
        name="tokenizer", what="`tokenizer.json`, by the library", prepare=_prepare, mutate=json_of, seeds=_seeds,
        native=True, share=1.5, memory_bytes=512 << 20, limit_s=10,
    ),
)  # fmt: skip
