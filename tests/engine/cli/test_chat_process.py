"""`pipeload chat` as its users have it: a process with pipes or a terminal, a real model, and a real Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.engine.harness import EMULATED, PATIENCE_S
from tests.engine.tasks.fakes import write_json
from tests.models import REPOSITORY

pytest.importorskip("jinja2")
pytest.importorskip("tokenizers")
pytestmark = pytest.mark.skipif(EMULATED, reason="subprocesses do not work under qemu")

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }} {% endfor %}assistant:"
SUMMARY = r"\d+ tokens in \d+\.\d s, \d+\.\d tokens/s; .* read, \d+\.\d\d GB/s"

# The command, which reports the tokens of each pass, and stops inside of one until it is released.
_PROGRAM = """
import fcntl, json, os, sys, termios
from concurrent.futures import Future
import pipeload
from pipeload.__main__ import main

log, gate, gated_pass = sys.argv.pop(), sys.argv.pop(), int(sys.argv.pop())
if os.isatty(0):
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
load, chat_prompt, result = pipeload.load, pipeload.Model.chat_prompt, Future.result
passes = 0

def note(**facts):
    with open(log, "a") as file:
        print(json.dumps(facts), file=file)

def progress(progress):
    global passes
    passes += progress.index == 1
    if progress.index == 1 and passes == gated_pass:
        open(gate + ".reached", "w").close()
        open(gate + ".released").close()

def noting(step):
    def noting_step(self, inputs, state, *arguments, **options):
        note(held=state.length, computed=inputs["input_ids"].shape[1])
        return step(self, inputs, state, *arguments, **options)
    return noting_step

def noting_prompt(self, messages, **options):
    ids = chat_prompt(self, messages, **options)
    note(messages=list(messages), tokens=len(ids))
    return ids

def waking_result(self, timeout=None):
    # A wait would sleep through a signal that comes just before it.
    while True:
        try:
            return result(self, 0.05)
        except TimeoutError:
            if self.done():
                raise

Future.result = waking_result
pipeload.load = lambda *arguments, **options: load(*arguments, **options | {"progress": progress})
for name in ("step", "step_top"):
    setattr(pipeload.Model, name, noting(getattr(pipeload.Model, name)))
pipeload.Model.chat_prompt = noting_prompt
main()
"""


@pytest.fixture(scope="module")
def talker(exported_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a word for each token, and a chat template."""
    tokenizers = pytest.importorskip("tokenizers")
    directory = tmp_path_factory.mktemp("talker") / "model"
    shutil.copytree(exported_llama, directory)
    special = ["<unk>", "system:", "user:", "assistant:"]
    words = [*special, *(f"w{number}" for number in range(1000 - len(special)))]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(directory, "tokenizer_config.json", {"chat_template": TEMPLATE})
    write_json(directory, "generation_config.json", {"eos_token_id": [], "max_new_tokens": 5})
    return directory


class Chat:
    """A running `pipeload chat`, and its notes."""

    def __init__(self, directory: Path, folder: Path, gated_pass: int, stdin: Any, stdout: Any, stderr: Any) -> None:
        self._log, self._gate = folder / "log", folder / "gate"
        for name in ("reached", "released"):
            os.mkfifo(f"{self._gate}.{name}")
        command = [sys.executable, "-c", _PROGRAM, "chat", str(directory), "--budget=8GB"]
        self.process = subprocess.Popen(
            [*command, str(gated_pass), str(self._gate), str(self._log)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TERM": "dumb", "INPUTRC": os.devnull},
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )

    def wait_reached(self) -> None:
        """Wait until the program stands inside of the pass."""
        Path(f"{self._gate}.reached").read_text()

    def release(self) -> None:
        """Let the pass go on."""
        Path(f"{self._gate}.released").write_text("")

    @property
    def turns(self) -> list[tuple[dict[str, Any], list[dict[str, int]]]]:
        """For each turn its prompt, and its passes."""
        found: list[tuple[dict[str, Any], list[dict[str, int]]]] = []
        for line in self._log.read_text().splitlines():
            facts = json.loads(line)
            if "messages" in facts:
                found.append((facts, []))
            else:
                found[-1][1].append(facts)
        return found


Begin = Callable[..., Chat]


@pytest.fixture
def begin(talker: Path, tmp_path: Path) -> Iterator[Begin]:
    begun: list[Chat] = []

    def start(gated_pass: int = 0, *, stdin: Any, stdout: Any, stderr: Any) -> Chat:
        begun.append(Chat(talker, tmp_path, gated_pass, stdin, stdout, stderr))
        return begun[-1]

    yield start
    for chat in begun:
        chat.process.kill()
        chat.process.communicate()


@pytest.fixture
def piped(begin: Begin) -> Callable[..., Chat]:
    return lambda gated_pass=0: begin(gated_pass, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _say(chat: Chat, line: str) -> str:
    """Write a line, and wait for the answer."""
    assert chat.process.stdin is not None
    assert chat.process.stdout is not None
    chat.process.stdin.write(f"{line}\n".encode())
    chat.process.stdin.flush()
    return chat.process.stdout.readline().decode()


def _end(chat: Chat) -> str:
    """Close stdin, and wait for the end; the last line on stderr."""
    out, err = chat.process.communicate(timeout=PATIENCE_S)
    assert (chat.process.returncode, out) == (0, b""), err
    return err.decode().splitlines()[-1]


@pytest.mark.slow
def test_what_was_said_before_is_not_computed_again(piped: Callable[..., Chat]) -> None:
    chat = piped()
    first, second = _say(chat, "w7 w8"), _say(chat, "w9")
    assert len(first.split()) == len(second.split()) == 5
    assert re.fullmatch(SUMMARY, _end(chat))
    (prompt, passes), (next_prompt, next_passes) = chat.turns
    assert [one["computed"] for one in passes] == [prompt["tokens"], 1, 1, 1, 1]
    assert next_prompt["messages"][1] == {"role": "assistant", "content": first.rstrip("\n")}
    # The last token of an answer was chosen, and no pass needed its keys and values.
    held = prompt["tokens"] + 4
    computed = next_prompt["tokens"] - held
    assert 0 < computed < held
    assert next_passes[0] == {"held": held, "computed": computed}
    assert [one["computed"] for one in next_passes[1:]] == [1, 1, 1, 1]


def test_ctrl_c_ends_the_answer_and_not_the_conversation(piped: Callable[..., Chat]) -> None:
    chat = piped(4)
    assert chat.process.stdin is not None
    assert chat.process.stdout is not None
    chat.process.stdin.write(b"w7 w8\n")
    chat.process.stdin.flush()
    chat.wait_reached()
    chat.process.send_signal(signal.SIGINT)
    # The answer ends while the pass still stands.
    partial = chat.process.stdout.readline().decode()
    assert len(partial.split()) == 3
    chat.release()
    assert len(_say(chat, "w9").split()) == 5
    assert _end(chat).startswith("8 tokens in ")
    (prompt, passes), (next_prompt, next_passes) = chat.turns
    assert len(passes) == 4
    assert next_prompt["messages"][1] == {"role": "assistant", "content": partial.rstrip("\n")}
    held = prompt["tokens"] + 2
    assert next_passes[0] == {"held": held, "computed": next_prompt["tokens"] - held}


@pytest.mark.slow
def test_ctrl_c_before_the_first_token_leaves_a_model_that_answers(piped: Callable[..., Chat]) -> None:
    chat = piped(1)
    assert chat.process.stdin is not None
    assert chat.process.stdout is not None
    chat.process.stdin.write(b"w7 w8\n")
    chat.process.stdin.flush()
    chat.wait_reached()
    chat.process.send_signal(signal.SIGINT)
    assert chat.process.stdout.readline() == b"\n"
    chat.release()
    answer = _say(chat, "w9")
    _end(chat)
    (_, (next_prompt, _)) = chat.turns
    assert [message["content"] for message in next_prompt["messages"]] == ["w9"]
    assert len(answer.split()) == 5


class Terminal:
    """The other side of a terminal."""

    def __init__(self, begin: Begin, gated_pass: int = 0) -> None:
        self._here, there = os.openpty()
        self.chat = begin(gated_pass, stdin=there, stdout=there, stderr=there)
        os.close(there)

    def type(self, text: str) -> None:
        os.write(self._here, text.encode())

    def wait_for(self, pattern: str) -> str:
        """The output up to this text, which is included."""
        seen = ""
        while not re.search(pattern, seen):
            assert self._comes(PATIENCE_S), f"{pattern} does not come after {seen!r}"
            seen += os.read(self._here, 1).decode()
        return seen

    def press(self, key: str) -> None:
        """Press a key until something happens: readline sleeps through a signal that comes just before it waits."""
        for _ in range(PATIENCE_S // 10):
            self.type(key)
            if self._comes(10):
                return

    def _comes(self, patience_s: float) -> bool:
        return bool(select.select([self._here], [], [], patience_s)[0])

    def close(self) -> None:
        os.close(self._here)


@contextmanager
def _terminal(begin: Begin, gated_pass: int = 0) -> Iterator[Terminal]:
    terminal = Terminal(begin, gated_pass)
    try:
        yield terminal
    finally:
        terminal.close()


@pytest.mark.parametrize("key", ["\x03", "\x04"], ids=["ctrl-c", "ctrl-d"])
def test_a_terminal_is_prompted_and_keys_end_answers_and_the_conversation(begin: Begin, key: str) -> None:
    with _terminal(begin, gated_pass=4) as terminal:
        terminal.wait_for("> $")
        terminal.type("w7 w8\n")
        terminal.chat.wait_reached()
        terminal.type("\x03")
        assert re.search(r"w7 w8\r\n( [\w:]+){3}", terminal.wait_for("> $"))
        terminal.chat.release()
        terminal.type("w9\n")
        assert re.search(r"w9\r\n( [\w:]+){5}\r\n", terminal.wait_for("> $"))
        terminal.press(key)
        terminal.wait_for(rf"\r\n{SUMMARY}\r\n")
        assert terminal.chat.process.wait(PATIENCE_S) == 0


@pytest.mark.real
@pytest.mark.slow
def test_the_real_smollm2_holds_a_conversation() -> None:
    directory = REPOSITORY / "models" / "exported" / "smollm2-135m"
    if not directory.is_dir():
        pytest.skip("needs pipeload export catalog:smollm2-135m models/exported/smollm2-135m")
    done = subprocess.run(
        [sys.executable, "-m", "pipeload", "chat", str(directory), "--max-new-tokens=24", "--budget=400MB"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        input="What is the capital of France?\nAnd of Italy?\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert (done.returncode, done.stdout) == (0, "The capital of France is Paris.\nThe capital of Italy is Rome.\n")
    assert re.fullmatch(SUMMARY, done.stderr.rstrip("\n"))
