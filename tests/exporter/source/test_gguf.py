"""Keys and tensors of a GGUF file are used, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.exporter.models import write_gguf

from pipeload_export.source.gguf import GgufFile
from pipeload_export.source.refused import Refused

Add = Callable[[Any], object]


def nothing(_: Any) -> None:
    pass


def model_of(path: Path, add: Add) -> Any:
    """The model of the file's config, with seeded weights, and with what transformers leaves out."""
    from transformers import AutoConfig, AutoModelForCausalLM

    file = GgufFile(write_gguf(path / "m.gguf", add))
    config = AutoConfig.from_pretrained(path, gguf_file="m.gguf")
    file.configure(config)
    model = AutoModelForCausalLM.from_config(config)
    file.apply(model)
    return model


def tokenizer_of(path: Path, add: Add) -> Any:
    from transformers import AutoTokenizer

    write_gguf(path / "m.gguf", add)
    made = AutoTokenizer.from_pretrained(path, gguf_file="m.gguf")
    GgufFile(path / "m.gguf").complete_tokenizer(made).save_pretrained(path / "out")
    return AutoTokenizer.from_pretrained(path / "out")


@pytest.mark.parametrize(("first", "last"), [(False, False), (True, False), (False, True), (True, True)])
def test_the_file_says_which_special_tokens_a_text_gets(tmp_path: Path, first: bool, last: bool) -> None:
    def add(writer: Any) -> None:
        writer.add_add_bos_token(first)
        writer.add_add_eos_token(last)

    ids = tokenizer_of(tmp_path, add)("abc").input_ids
    assert ids == [1] * first + [29, 5] + [2] * last


@pytest.mark.parametrize(("pre", "first"), [("gpt-2", False), ("llama-bpe", True)])
def test_a_file_that_does_not_say_gets_those_of_llama_cpp(tmp_path: Path, pre: str, first: bool) -> None:
    tokenizer = tokenizer_of(tmp_path, lambda writer: writer.add_tokenizer_pre(pre))
    assert tokenizer("abc").input_ids == [1] * first + [29, 5]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", "ab 1234 Ġ5"),
        ("smollm", "ab 1 2 3 4 Ġ 5"),
        ("llama-bpe", "ab 123 4 Ġ 5"),
        ("qwen2", "ab 1 2 3 4 Ġ 5"),
    ],
)
def test_words_are_cut_by_the_rules_that_the_file_names(tmp_path: Path, pre: str, words: str) -> None:
    tokenizer = tokenizer_of(tmp_path, lambda writer: writer.add_tokenizer_pre(pre))
    found = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("ab1234 5")
    assert [word for word, _ in found] == words.split()


def test_rules_that_are_unknown_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"by the rules of 'viking' \(tokenizer\.ggml\.pre\)"):
        tokenizer_of(tmp_path, lambda writer: writer.add_tokenizer_pre("viking"))


def test_user_defined_tokens_are_whole(tmp_path: Path) -> None:
    import gguf

    def add(writer: Any) -> None:
        kinds = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 26 + [gguf.TokenType.USER_DEFINED] * 2
        writer.kv_data[0].pop("tokenizer.ggml.token_type")
        writer.add_token_types(kinds)

    assert tokenizer_of(tmp_path, add)("zcdz").input_ids == [28, 30, 28]


def test_factors_of_the_frequencies_are_used(tmp_path: Path) -> None:
    factors = np.array([1, 1, 1, 2, 4, 8, 8, 8], np.float32)
    plain = model_of(tmp_path / "plain", nothing).model.rotary_emb.inv_freq.numpy()
    scaled = model_of(tmp_path / "scaled", lambda writer: writer.add_tensor("rope_freqs.weight", factors))
    np.testing.assert_allclose(scaled.model.rotary_emb.inv_freq.numpy(), plain / factors)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scaling_of_the_rope_is_used(tmp_path: Path, kind: str) -> None:
    import gguf

    def add(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(4.0)
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(16)

    config = model_of(tmp_path, add).config
    original = {"original_max_position_embeddings": 16} if kind == "yarn" else {}
    assert config.rope_scaling == {"rope_type": kind, "factor": 4.0, **original}


@pytest.mark.parametrize(
    ("add", "said"),
    [
        (lambda writer: writer.add_sliding_window(16), r"1 key .* llama\.attention\.sliding_window = 16"),
        (lambda writer: writer.add_logit_scale(0.5), r"1 key .* llama\.logit_scale = 0\.5"),
        (lambda writer: writer.add_key_length(7), r"1 key .* llama\.attention\.key_length = 7"),
        (lambda writer: writer.add_rope_scaling_factor(4.0), r"1 key .* llama\.rope\.scaling\.factor = 4\.0"),
        (
            lambda writer: writer.add_tensor("blk.0.attn_q.bias", np.ones(32, np.float32)),
            r"1 tensor .* LlamaForCausalLM .*: blk\.0\.attn_q\.bias",
        ),
        (
            lambda writer: writer.add_tensor("blk.1.attn_q_norm.weight", np.ones(16, np.float32)),
            r"1 tensor .*: blk\.1\.attn_q_norm\.weight",
        ),
        (
            lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(3, np.float32)),
            r"1 tensor .*: rope_freqs\.weight",
        ),
    ],
)
def test_what_is_not_used_is_refused_by_name(tmp_path: Path, add: Add, said: str) -> None:
    with pytest.raises(Refused, match=said):
        model_of(tmp_path, add)


def test_keys_that_change_nothing_are_no_reason(tmp_path: Path) -> None:
    import gguf

    def add(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_key_length(16)
        writer.add_value_length(16)
        writer.add_author("somebody")
        writer.add_file_type(3)

    model_of(tmp_path, add)
