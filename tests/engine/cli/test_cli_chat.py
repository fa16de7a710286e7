"""`pipeload chat`: turns, Ctrl-C, refused options, and the line at the end."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from tests.engine.tasks.fakes import WithFiles, manifest, write_gpt_tokenizer, write_json
from typer.testing import CliRunner, Result

import pipeload
from pipeload.cli import app
from pipeload.errors import ClosedError, ConfigError, PipeloadError, ShardError
from pipeload.format.manifest import Manifest
from pipeload.tasks.chat.chat import chat_prompt
from pipeload.tasks.generate.generate import Generation
from pipeload.tasks.text.tokenizer import tokenizer_of
from pipeload.tracing.stats import Stats

pytest.importorskip("jinja2")
pytest.importorskip("tokenizers")

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}: {{ message.content }}]{% endfor %}"
    "{% if add_generation_prompt %}[assistant: {% endif %}"
)
BYTES = 3_000_000
"""The bytes that each answer reads."""

Event = str | BaseException


class Talker(WithFiles):
    """A model and its session. Each answer is a list of pieces; an exception in it is raised there."""

    def __init__(self, directory: Path, answers: Sequence[Sequence[Event]]) -> None:
        self.directory = directory
        self.manifest: Manifest = manifest("text-generation", cached=True)
        self.stats, self.plan = Stats(), None
        self.prompts: list[str] = []
        self.options: list[dict[str, Any]] = []
        self.closed = 0
        self._answers = iter(answers)

    def session(self) -> Self:
        return self

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return chat_prompt(self, messages)  # type: ignore[arg-type]

    def generate(self, prompt: list[int], *, streamer: Callable[[str], None], **options: Any) -> Generation:
        tokenizer = tokenizer_of(self)  # type: ignore[arg-type]
        self.prompts.append(tokenizer.decode(prompt))
        self.options.append(options)
        self.stats = Stats(read_bytes=self.stats.read_bytes + BYTES)
        answer = ""
        for event in next(self._answers):
            if isinstance(event, BaseException):
                raise event
            streamer(event)
            answer += event
        ids = tokenizer.encode(answer).ids
        end = "length" if len(ids) == options["max_new_tokens"] else "eos"
        return Generation(text=answer, token_ids=ids, prompt_tokens=len(prompt), finish_reason=end, sweeps=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closed += 1


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_gpt_tokenizer(tmp_path, chat_template=TEMPLATE)
    monkeypatch.setattr("pipeload.cli.commands.chat.manifests.read", lambda _: manifest("text-generation", cached=True))
    return tmp_path


@pytest.fixture
def talk(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Result, Talker]]:
    """Run the command on a model that gives these answers; an answer may be one text."""

    def run(answers: Sequence[str | Sequence[Event]], *arguments: str, stdin: str | bytes) -> tuple[Result, Talker]:
        talker = Talker(directory, [[answer] if isinstance(answer, str) else answer for answer in answers])
        monkeypatch.setattr(pipeload, "load", lambda *_, **__: talker)
        result = CliRunner().invoke(app, ["chat", str(directory), *arguments], input=stdin)
        assert talker.closed == (2 if talker.prompts else talker.closed)
        return result, talker

    return run


Talk = Callable[..., tuple[Result, Talker]]


def _types(monkeypatch: pytest.MonkeyPatch, *events: Event) -> None:
    """A user at a terminal who types lines; an exception among them is raised in the place of a line."""
    coming: Iterator[Event] = iter(events)

    def typed() -> Iterator[str]:
        for event in coming:
            if isinstance(event, BaseException):
                raise event
            yield event

    monkeypatch.setattr("pipeload.cli.commands.chat.read_turns", typed)
    monkeypatch.setattr("pipeload.cli.commands.chat.is_typed", lambda: True)


def test_each_line_is_answered_with_all_that_was_said_before(talk: Talk) -> None:
    result, talker = talk([["Par", "is."], "Rome."], stdin="France?\n\n  \n Italy? \n")
    assert (result.exit_code, result.stdout) == (0, "Paris.\nRome.\n")
    assert talker.prompts == [
        "[user: France?][assistant: ",
        "[user: France?][assistant: Paris.][user: Italy?][assistant: ",
    ]
    pattern = r"\d+ tokens in \d+\.\d s, \d+\.\d tokens/s; 6\.0 MB read, \d+\.\d\d GB/s\n"
    assert re.fullmatch(pattern, result.stderr)


def test_the_last_line_counts_tokens_and_bytes_of_answers(
    talk: Talk, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([10.0, 12.0, 100.0, 101.0])
    monkeypatch.setattr("pipeload.cli.commands.chat.time.perf_counter", lambda: next(seconds))
    result, talker = talk(["Paris.", "Rome."], stdin="a\nb\n")
    tokens = sum(len(tokenizer_of(talker).encode(text).ids) for text in ("Paris.", "Rome."))  # type: ignore[arg-type]
    assert result.stderr == f"{tokens} tokens in 3.0 s, {tokens / 3:.1f} tokens/s; 6.0 MB read, 0.00 GB/s\n"


def test_nothing_said_is_no_error(talk: Talk) -> None:
    result, _ = talk([], stdin="")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == ""


def test_the_system_message_comes_first(talk: Talk) -> None:
    _, talker = talk(["b"], "--system", "Be brief.", stdin="a\n")
    assert talker.prompts == ["[system: Be brief.][user: a][assistant: "]


def test_an_interrupted_answer_stays_as_far_as_it_came(talk: Talk) -> None:
    result, talker = talk([["The cap", "ital", KeyboardInterrupt()], "Rome."], stdin="France?\nItaly?\n")
    assert (result.exit_code, result.stdout) == (0, "The capital\nRome.\n")
    assert talker.prompts[1] == "[user: France?][assistant: The capital][user: Italy?][assistant: "
    tokens = sum(len(tokenizer_of(talker).encode(text).ids) for text in ("The capital", "Rome."))  # type: ignore[arg-type]
    assert result.stderr.startswith(f"{tokens} tokens in ")
    assert "; 6.0 MB read" in result.stderr


@pytest.mark.parametrize("answer", [[], [KeyboardInterrupt()]])
def test_a_question_without_an_answer_is_forgotten(talk: Talk, answer: Sequence[Event]) -> None:
    result, talker = talk([answer, "Rome."], stdin="France?\nItaly?\n")
    assert (result.exit_code, result.stdout) == (0, "\nRome.\n")
    assert talker.prompts[1] == "[user: Italy?][assistant: "


def test_ctrl_c_at_the_prompt_ends_it(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    _types(monkeypatch, "France?", KeyboardInterrupt(), "Italy?")
    result, talker = talk(["Paris."], stdin="")
    assert (result.exit_code, result.stdout) == (0, "Paris.\n")
    assert len(talker.prompts) == 1
    assert re.fullmatch(r"\n\d+ tokens in .*\n", result.stderr)


def test_options_reach_the_generation(talk: Talk) -> None:
    numbers = [
        "--max-new-tokens=90",
        "--min-new-tokens=2",
        "--top-k=3",
        "--no-repeat-ngram-size=4",
        "--seed=5",
        "--lookup=7",
    ]
    shares = ["--temperature=0.5", "--top-p=0.9", "--min-p=0.1", "--repetition-penalty=1.2"]
    result, talker = talk(["b", "c"], *numbers, *shares, "--sample", "--stop=.", "--stop=the end", stdin="a\na\n")
    expected = {
        "max_new_tokens": 90,
        "min_new_tokens": 2,
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 4,
        "stop_strings": [".", "the end"],
        "prompt_lookup_num_tokens": 7,
        "seed": 5,
    }
    assert result.exit_code == 0, result.exception
    assert talker.options == [expected, expected]


@pytest.mark.parametrize(("settings", "most"), [({}, 256), ({"max_new_tokens": 300, "min_new_tokens": 290}, 300)])
def test_an_answer_has_as_many_tokens_as_the_model_says(
    talk: Talk, directory: Path, settings: dict[str, int], most: int
) -> None:
    write_json(directory, "generation_config.json", settings)
    assert talk(["b"], stdin="a\n")[1].options[0]["max_new_tokens"] == most


def test_an_answer_that_was_cut_is_noted(talk: Talk) -> None:
    result, _ = talk(["abcd"], "--max-new-tokens=4", stdin="a\n")
    assert result.stdout == "abcd\n"
    note = "note: the answer was cut after 4 tokens; --max-new-tokens allows more."
    assert result.stderr.splitlines()[0] == note


def test_answers_end_with_the_models_positions(talk: Talk, directory: Path) -> None:
    prompt = len(chat_prompt(Talker(directory, []), [{"role": "user", "content": "a"}]))  # type: ignore[arg-type]
    write_json(directory, "config.json", {"max_position_embeddings": prompt + 4})
    result, talker = talk(["abcd"], stdin="a\n")
    assert talker.options[0]["max_new_tokens"] == 4
    note = "note: the answer was cut after 4 tokens; the model has no more positions."
    assert result.stderr.splitlines()[0] == note


def test_a_conversation_that_is_too_long_for_the_model_is_an_error(talk: Talk, directory: Path) -> None:
    write_json(directory, "config.json", {"max_position_embeddings": 40})
    result, talker = talk(["b"], stdin=f"a\n{'long ' * 40}\n")
    assert isinstance(result.exception, ConfigError)
    assert re.match(r"The conversation has \d+ tokens now, and the model has positions for 40", str(result.exception))
    assert len(talker.prompts) == 1


def test_who_types_may_go_on_after_an_error(talk: Talk, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(directory, "config.json", {"max_position_embeddings": 60})
    _types(monkeypatch, "a", "long " * 40, "b", "c")
    result, talker = talk(["A", ["B", ShardError("It broke.")], "C"], stdin="")
    assert (result.exit_code, result.stdout) == (0, "A\nB\nC\n")
    assert talker.prompts[1:] == [f"[user: a][assistant: A][user: {line}][assistant: " for line in "bc"]
    first, second, _ = result.stderr.splitlines()
    assert first.startswith("error: The conversation has ")
    assert second == "error: It broke."


@pytest.mark.parametrize("typed", [True, False])
def test_a_model_that_was_closed_is_the_end(talk: Talk, monkeypatch: pytest.MonkeyPatch, typed: bool) -> None:
    if typed:
        _types(monkeypatch, "a", "b")
    result, _ = talk([["A", ClosedError("The model is closed.")]], stdin="a\nb\n")
    assert isinstance(result.exception, ClosedError)
    assert result.stdout == "A\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sample", "--temperature=nan"], "temperature must be a number from 0 on"),
        (["--min-new-tokens=300"], "min_new_tokens is 300, more than the 256 of max_new_tokens"),
        (["--repetition-penalty=0"], "repetition_penalty must be"),
        (["--system", "Be brief."], "cannot take these messages: System role not supported"),
    ],
)
def test_what_cannot_work_is_refused_before_the_model_is_loaded(
    directory: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    (directory / "chat_template.jinja").write_text(refusing)
    monkeypatch.setattr(pipeload, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    result = CliRunner().invoke(app, ["chat", str(directory), *arguments], input="a\n")
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


def test_a_model_without_a_template_is_refused_before_it_is_loaded(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gpt_tokenizer(directory)
    monkeypatch.setattr(pipeload, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    result = CliRunner().invoke(app, ["chat", str(directory)], input="a\n")
    assert isinstance(result.exception, ConfigError)
    assert "has no chat template" in str(result.exception)


def test_no_directory_of_a_model_is_said_as_everywhere(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["chat", str(tmp_path / "missing")], input="a\n")
    assert isinstance(result.exception, PipeloadError)
    assert "pipeload.json" in str(result.exception)


def test_lines_are_utf_8(talk: Talk) -> None:
    result, talker = talk(["b"], stdin=b"Z\xc3\xbcrich\nZ\xfcrich\n")
    assert talker.prompts == ["[user: Zürich][assistant: "]
    assert result.exit_code == 2
    assert result.stderr == "error: stdin is no UTF-8 text: invalid start byte at byte 1 of a line.\n"


def test_commands_at_a_terminal_do_not_go_to_the_model(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """`/help` was answered by the model."""
    _types(monkeypatch, "a", "/help", "/new", "b", "/unknown", "/exit", "c")
    result, talker = talk(["A", "B", "U"], "--system", "Be brief.", stdin="")
    assert result.stdout == "A\nB\nU\n"
    assert "/new" in result.stderr
    system = "[system: Be brief.]"
    assert talker.prompts == [
        f"{system}[user: a][assistant: ",
        f"{system}[user: b][assistant: ",
        f"{system}[user: b][assistant: B][user: /unknown][assistant: ",
    ]


def test_a_pipe_carries_messages_only(talk: Talk) -> None:
    _, talker = talk(["A"], stdin="/help\n")
    assert talker.prompts == ["[user: /help][assistant: "]


def test_chat_prints_each_answer_as_json(talk: Talk) -> None:
    result, _ = talk([["Par", "is."], ["Rom", KeyboardInterrupt()]], "--json", stdin="France?\nItaly?\n")
    first, second = map(json.loads, result.stdout.splitlines())
    assert first.pop("tokens") > 0
    assert first == {"role": "assistant", "content": "Paris.", "finish_reason": "eos"}
    assert second == {"role": "assistant", "content": "Rom", "finish_reason": "interrupted", "tokens": None}
