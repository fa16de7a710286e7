"""`make serve-demo` with tiny models: it serves, calls, and its exit code says whether the answers were right."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from benchmarks.serve_demo.__main__ import demo
from benchmarks.serve_demo.calls import CALLS, Call
from rich.console import Console
from tests.integration.test_serve import folder

pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("serve")]

__all__ = ["folder"]

_EMBEDDING, _CHAT = CALLS


def _count(answer: dict[str, Any]) -> str:
    return f"{len(answer['data'][0]['embedding'])} numbers"


def _run(folder: Path, *calls: Call) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=160, highlight=False)
    code = demo([folder / "embedder", folder / "chat"], calls, console, port=0, once=True)
    return code, console.file.getvalue()  # type: ignore[attr-defined]


def _chat(text: str) -> Call:
    body = {"model": "chat", "messages": [{"role": "user", "content": text}], "max_tokens": 8}
    return Call(path=_CHAT.path, body=body, told=_CHAT.told)


def test_it_calls_both_models_and_prints_lines_for_a_shell(folder: Path) -> None:
    embedding = Call(path=_EMBEDDING.path, body={"model": "embedder", "input": "a cat"}, told=_count)
    code, told = _run(folder, embedding, _chat("What is the capital of France?"))
    assert code == 0, told
    assert " numbers" in told
    assert told.count("curl -s http://127.0.0.1:") == 2
    assert "Peak memory: " in told


@pytest.mark.parametrize(
    "call",
    [
        # It has not 384 numbers.
        Call(path=_EMBEDDING.path, body={"model": "embedder", "input": "a cat"}, told=_EMBEDDING.told),
        # There is no such model.
        Call(path=_CHAT.path, body={"model": "minilm", "messages": [], "max_tokens": 1}, told=_CHAT.told),
    ],
    ids=["another length", "an error"],
)
def test_a_wrong_answer_ends_it_with_an_error(folder: Path, call: Call) -> None:
    code, told = _run(folder, call)
    assert (code, "WRONG" in told) == (1, True), told


def test_a_server_that_cannot_start_ends_it_with_an_error(tmp_path: Path) -> None:
    code = demo([tmp_path], (), Console(file=io.StringIO()), port=0, once=True)
    assert code == 1
