"""Chat templates: the texts and tokens of transformers, and nothing beyond a template's needs."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.engine.harness import EMULATED
from tests.engine.tasks.fakes import (
    ToyDecoder,
    ToyRunner,
    files_in,
    manifest,
    write_bert_tokenizer,
    write_gpt_tokenizer,
)

from pipeload.errors import ConfigError, ShardError
from pipeload.tasks.chat.chat import chat_prompt, find_template

pytest.importorskip("jinja2")
pytest.importorskip("tokenizers")

# As published with models of these names, shortened where nothing new would come.
TEMPLATES = {path.stem: path.read_text() for path in sorted((Path(__file__).parent / "templates").iterdir())}

QUESTION = {"role": "user", "content": " What <b>is</b>\n 'it' & why? "}
ANSWER = {"role": "assistant", "content": "Zwölf 日本語 🙂.\n"}
SYSTEM = {"role": "system", "content": "Be brief."}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def _decoder(directory: Path, template: object = None, **settings: object) -> ToyDecoder:
    write_gpt_tokenizer(directory, **TOKENS | {"chat_template": template} | settings)
    return ToyDecoder(directory)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
@pytest.mark.parametrize("beginning", [[], [SYSTEM]], ids=["", "system"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_texts_are_those_of_transformers(
    tmp_path: Path, template: str, beginning: list[dict[str, str]], add_generation_prompt: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    _decoder(tmp_path, template)
    ours, theirs = find_template(files_in(tmp_path)), transformers.GPT2TokenizerFast.from_pretrained(tmp_path)
    for messages in ([QUESTION], [QUESTION, ANSWER, QUESTION]):
        conversation = [*beginning, *messages]
        options = {"add_generation_prompt": add_generation_prompt}
        if template is TEMPLATES["mistral"] and beginning:
            for refuses in (partial(theirs.apply_chat_template, tokenize=False), ours.render):
                with pytest.raises(Exception, match="Conversation roles must alternate"):
                    refuses(conversation, **options)
        else:
            expected = theirs.apply_chat_template(conversation, tokenize=False, **options)
            assert ours.render(conversation, **options) == expected


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_tokens_are_those_of_transformers(tmp_path: Path, template: str) -> None:
    transformers = pytest.importorskip("transformers")
    model = _decoder(tmp_path, template, **dict.fromkeys(TOKENS, "<|endoftext|>"))
    expected = transformers.GPT2TokenizerFast.from_pretrained(tmp_path).apply_chat_template([QUESTION, ANSWER])
    assert chat_prompt(model, [QUESTION, ANSWER], add_generation_prompt=False) == expected


def test_variables_reach_the_template(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = _decoder(tmp_path, TEMPLATES["qwen"])
    theirs = transformers.GPT2TokenizerFast.from_pretrained(tmp_path)
    tools = [{"type": "function", "function": {"name": "größer", "parameters": {}}}]
    for variables in ({"enable_thinking": False}, {"tools": tools}, {"eos_token": "other"}):
        expected = theirs.apply_chat_template([QUESTION], add_generation_prompt=True, **variables)
        assert chat_prompt(model, [QUESTION], **variables) == expected


def test_special_tokens_come_once(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    template = "{{ cls_token }}{% for message in messages %}{{ message.content + sep_token }}{% endfor %}"
    write_bert_tokenizer(tmp_path, chat_template=template)
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    ids = chat_prompt(ToyRunner(tmp_path, manifest("text-generation"), dict), messages)
    assert ids == [2, 5, 6, 3, 8, 3]
    theirs = transformers.BertTokenizerFast.from_pretrained(tmp_path)
    assert theirs.apply_chat_template(messages) == ids


ADDED = {"content": "<s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}


@pytest.mark.parametrize(
    "settings",
    [
        {"bos_token": None},
        {"bos_token": ADDED | {"__type": "AddedToken"}},
        {"additional_special_tokens": ["<a>", "<b>"]},
        {"additional_special_tokens": [ADDED | {"__type": "AddedToken"}]},
        {"added_tokens_decoder": {"300": ADDED}},
    ],
)
@pytest.mark.parametrize("kept", [None, {"bos_token": "<old>"}, {"bos_token": ADDED, "unk_token": "<unk>"}])
def test_special_tokens_are_those_of_transformers(
    tmp_path: Path, settings: dict[str, object], kept: dict[str, object] | None
) -> None:
    transformers = pytest.importorskip("transformers")
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens")
    _decoder(tmp_path, "".join(f"[{{{{ {name} }}}}]" for name in names), **settings)
    if kept is not None:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(kept))
    # Other classes have tokens of their own where the files have none.
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template([QUESTION], tokenize=False)
    assert find_template(files_in(tmp_path)).render([QUESTION]) == expected


@pytest.mark.slow
@pytest.mark.real
def test_smollm2_is_prompted_as_by_transformers(smollm2_tokenizer: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_tokenizer)
    model = ToyDecoder(smollm2_tokenizer)
    for messages in ([QUESTION], [SYSTEM, QUESTION, ANSWER, QUESTION]):
        for flag in (True, False):
            expected = theirs.apply_chat_template(messages, add_generation_prompt=flag)
            assert chat_prompt(model, messages, add_generation_prompt=flag) == expected


def test_a_file_of_its_own_comes_before_the_settings(tmp_path: Path) -> None:
    _decoder(tmp_path, "settings")
    assert find_template(files_in(tmp_path)).render([QUESTION]) == "settings"
    (tmp_path / "chat_template.jinja").write_text("file {{ eos_token }}\n")
    assert find_template(files_in(tmp_path)).render([QUESTION]) == "file </s>"


def test_of_several_templates_the_default_counts(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    _decoder(tmp_path, several)
    assert find_template(files_in(tmp_path)).render([QUESTION]) == "plain"
    _decoder(tmp_path, several[:1])
    with pytest.raises(ConfigError, match=r"\['tool_use'\], and none is 'default'\. Put the one that you want into"):
        find_template(files_in(tmp_path))


def test_a_model_without_a_template_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{tmp_path} has no chat template, neither .* Take its instruct"):
        chat_prompt(_decoder(tmp_path), [QUESTION])


@pytest.mark.parametrize("source", ["{% for %}", "{{ messages", "{% if true %}", "{% nonsense %}"])
def test_a_damaged_template_is_named(tmp_path: Path, source: str) -> None:
    with pytest.raises(ShardError, match=r"tokenizer_config.json is damaged in line 2: .* Export the model again\."):
        chat_prompt(_decoder(tmp_path, f"\n{source}"), [QUESTION])


def test_a_template_file_must_be_text_inside_the_directory(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    _decoder(model)
    file = model / "chat_template.jinja"
    file.write_bytes(b"a\xff")
    with pytest.raises(ShardError, match="no UTF-8 text: invalid start byte at byte 1"):
        find_template(files_in(model))
    (tmp_path / "outside.jinja").write_text("outside")
    file.unlink()
    file.symlink_to(tmp_path / "outside.jinja")
    with pytest.raises(ShardError, match="leads out of the model directory"):
        find_template(files_in(model))


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('touch owned') }}",
        "{{ lipsum.__globals__['os'] }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ '{a.__class__.__mro__}'.format_map({'a': 1}) }}",
    ],
)
def test_a_template_that_reaches_for_python_is_stopped(tmp_path: Path, attack: str) -> None:
    messages = [dict(QUESTION)]
    with pytest.raises(ShardError, match=r"was stopped: .* do not trust this one"):
        chat_prompt(_decoder(tmp_path, attack), messages)
    assert messages == [QUESTION]


@pytest.mark.parametrize(
    "attack", ["''.__class__", "strftime_now.__globals__", "messages.append", "namespace.__init__"]
)
def test_what_a_template_may_not_have_is_nothing(tmp_path: Path, attack: str) -> None:
    _decoder(tmp_path, f"[{{{{ {attack} }}}}]")
    assert find_template(files_in(tmp_path)).render([QUESTION]) == "[]"


@pytest.mark.parametrize("template", ["{% include 'secret' %}", "{% import '/etc/passwd' as x %}", "{% extends 'a' %}"])
def test_a_template_reads_no_file(tmp_path: Path, template: str) -> None:
    with pytest.raises(ConfigError, match="cannot take these messages: no loader for this environment"):
        chat_prompt(_decoder(tmp_path, template), [QUESTION])


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('Only user and assistant roles are supported!') }}", "Only user and assistant roles"),
        ("{{ messages[0].nothing.at_all }}", "'dict object' has no attribute 'nothing'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages + 1 }}", "can only concatenate list"),
        ("{% for i in range(1000000) %}{% endfor %}", "Range too big"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "recursion"),
    ],
)
def test_messages_that_a_template_cannot_take_are_refused(tmp_path: Path, template: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot take these messages: .*{why}.*Pass messages with the roles"):
        chat_prompt(_decoder(tmp_path, template), [QUESTION])


@pytest.mark.parametrize("messages", [[], "Hello", None, {"role": "user", "content": "Hello"}])
def test_messages_are_a_sequence(tmp_path: Path, messages: Any) -> None:
    with pytest.raises(ConfigError, match="messages must be a sequence of at least one message, not "):
        chat_prompt(_decoder(tmp_path, "x"), messages)


@pytest.mark.parametrize("message", ["Hello", {"content": "Hello"}, {"role": 1, "content": "Hello"}, None])
def test_a_message_has_a_role(tmp_path: Path, message: Any) -> None:
    with pytest.raises(ConfigError, match="A message must be a dict with 'role' and 'content', not "):
        chat_prompt(_decoder(tmp_path, "x"), [QUESTION, message])


@pytest.mark.skipif(EMULATED, reason="subprocesses do not work under qemu")
def test_without_jinja_the_extra_is_named(tmp_path: Path) -> None:
    _decoder(tmp_path, "x")
    program = (
        "import sys; sys.modules['jinja2'] = None\n"
        "import pipeload.model; from pathlib import Path\n"
        "from pipeload.tasks.chat.chat import find_template\n"
        "from tests.engine.tasks.fakes import files_in\n"
        "find_template(files_in(Path(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.endswith("ConfigError: Chat templates need jinja2: pip install jinja2.\n")
