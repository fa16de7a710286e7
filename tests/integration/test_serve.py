"""`pipeload serve` in a process of its own, called by the programs that people use."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine.serve.conftest import TEMPLATE, with_words
from tests.engine.tasks.fakes import WORDS, write_bert_tokenizer, write_json
from tests.models import made_once

import pipeload

httpx2 = pytest.importorskip("httpx2")

pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("serve")]

_PATIENCE_S = 300
_MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@contextmanager
def served(*arguments: object) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server with these arguments: its address, and its process."""
    command = [sys.executable, "-m", "pipeload", "serve", *map(str, arguments), "--port", "0"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address.startswith("http://"), process.communicate()
            yield address, process
        finally:
            process.terminate()
            process.communicate(timeout=_PATIENCE_S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories of a tiny chat model and a tiny embedder."""
    for package in ("torch", "transformers", "uvicorn", "openai"):
        pytest.importorskip(package)
    made = made_once("llama", "bert")
    folder = tmp_path_factory.mktemp("served")
    with_words(Path(shutil.copytree(made / "llama", folder / "chat")), chat_template=TEMPLATE)
    embedder = Path(shutil.copytree(made / "bert", folder / "embedder"))
    write_bert_tokenizer(embedder)
    write_json(embedder, "config.json", {"vocab_size": len(WORDS)})
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    alias = f"gpt-4o-mini={folder / 'chat'}"
    with served(folder / "chat", folder / "embedder", "--budget", "4GB", "--alias", alias) as (address, _):
        yield address


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Any]:
    """The library's own answers."""
    with pipeload.load(folder / "chat", "4GB") as model:
        ids = model.chat_prompt(_MESSAGES)
        chat = model.generate(ids, max_new_tokens=8)
        drawn = model.generate(ids, max_new_tokens=8, do_sample=True, temperature=0.9, seed=7)
        text = model.generate("The capital", max_new_tokens=5)
    with pipeload.load(folder / "embedder", "4GB") as model:
        vectors = model.embed(["the cat", "a dog sat"])
    return {"chat": chat.text, "drawn": drawn.text, "text": text.text, "vectors": vectors}


@pytest.fixture
def client(address: str) -> Iterator[Any]:
    """OpenAI's own client, which retries nothing."""
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_openai_chats(client: Any, expected: dict[str, Any]) -> None:
    asked = {"model": "gpt-4o-mini", "messages": _MESSAGES, "max_tokens": 8}
    made = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    assert made.choices[0].message.content == expected["chat"]
    assert len(made.choices[0].logprobs.content[0].top_logprobs) == 2
    assert made.usage.completion_tokens == 8
    drawn = client.chat.completions.create(
        **asked, temperature=0.9, seed=7, n=2, extra_body={"min_p": 0.0, "top_k": 50}
    )
    assert drawn.choices[0].message.content == expected["drawn"]
    assert len(drawn.choices) == 2
    stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(one.choices[0].delta.content or "" for one in chunks if one.choices) == expected["chat"]
    assert chunks[-1].usage.total_tokens == made.usage.total_tokens


def test_openai_streams_can_be_left(client: Any, address: str) -> None:
    stream = client.chat.completions.create(model="chat", messages=_MESSAGES, max_tokens=60, stream=True)
    next(iter(stream))
    stream.close()
    assert client.completions.create(model="chat", prompt="x", max_tokens=1).usage.completion_tokens == 1


def test_openai_completes_embeds_and_lists(client: Any, expected: dict[str, Any]) -> None:
    assert (
        client.completions.create(model="chat", prompt="The capital", max_tokens=5).choices[0].text == expected["text"]
    )
    # The client asks for base64 by itself, and decodes it.
    made = client.embeddings.create(model="embedder", input=["the cat", "a dog sat"])
    vectors = np.array([one.embedding for one in made.data], np.float32)
    np.testing.assert_allclose(vectors, expected["vectors"], atol=1e-5)
    floats = client.embeddings.create(model="embedder", input="the cat", encoding_format="float", dimensions=4)
    assert len(floats.data[0].embedding) == 4
    assert sorted(one.id for one in client.models.list()) == ["chat", "embedder", "gpt-4o-mini"]
    assert client.models.retrieve("gpt-4o-mini").root == "chat"


def test_openai_gets_responses(client: Any, expected: dict[str, Any]) -> None:
    asked = {"model": "chat", "input": _MESSAGES[0]["content"], "max_output_tokens": 8}
    made = client.responses.create(**asked)
    assert made.output_text == expected["chat"]
    assert made.status == "incomplete"
    events = list(client.responses.create(**asked, stream=True))
    assert "".join(one.delta for one in events if one.type == "response.output_text.delta") == expected["chat"]
    assert events[-1].response.output_text == expected["chat"]


def test_openai_raises_its_own_errors(client: Any) -> None:
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.NotFoundError, match="There is no model 'gpt-5' here"):
        client.chat.completions.create(model="gpt-5", messages=_MESSAGES)
    with pytest.raises(openai.BadRequestError, match="reasoning_effort") as caught:
        client.chat.completions.create(model="chat", messages=_MESSAGES, reasoning_effort="high")
    assert caught.value.param == "reasoning_effort"


def test_langchain_chats_and_embeds(address: str, expected: dict[str, Any]) -> None:
    langchain = pytest.importorskip("langchain_openai")
    chat = langchain.ChatOpenAI(
        model="chat", base_url=f"{address}/v1", api_key="unused", max_tokens=8, temperature=0, max_retries=0
    )
    assert chat.invoke(_MESSAGES[0]["content"]).content == expected["chat"]
    assert "".join(str(one.content) for one in chat.stream(_MESSAGES[0]["content"])) == expected["chat"]
    embedder = langchain.OpenAIEmbeddings(
        model="embedder", base_url=f"{address}/v1", api_key="unused", check_embedding_ctx_length=False, max_retries=0
    )
    vectors = embedder.embed_documents(["the cat", "a dog sat"])
    np.testing.assert_allclose(np.array(vectors, np.float32), expected["vectors"], atol=1e-5)


def _curl(url: str, *arguments: str) -> str:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    done = subprocess.run(
        ["curl", "--silent", "--show-error", "--no-buffer", url, *arguments],
        capture_output=True,
        text=True,
        timeout=_PATIENCE_S,
        check=True,
    )
    return done.stdout


def _posted(url: str, body: object) -> str:
    return _curl(url, "-H", "Content-Type: application/json", "-d", json.dumps(body))


def test_curl_calls_every_kind_of_route(address: str, expected: dict[str, Any]) -> None:
    assert json.loads(_curl(f"{address}/health"))["status"] in ("ok", "loading")
    chat = {"model": "chat", "messages": _MESSAGES, "max_tokens": 8}
    made = json.loads(_posted(f"{address}/v1/chat/completions", chat))
    assert made["choices"][0]["message"]["content"] == expected["chat"]
    streamed = _posted(f"{address}/v1/chat/completions", chat | {"stream": True})
    assert streamed.endswith("data: [DONE]\n\n")
    vectors = json.loads(_posted(f"{address}/embed", {"inputs": ["the cat", "a dog sat"], "normalize": False}))
    np.testing.assert_allclose(np.array(vectors, np.float32), expected["vectors"], atol=1e-5)
    assert json.loads(_posted(f"{address}/tokenize", {"model": "embedder", "prompt": "the cat"}))["count"] == 4
    assert "pipeload_requests_total" in _curl(f"{address}/metrics")
    assert "/v1/embeddings" in json.loads(_curl(f"{address}/openapi.json"))["paths"]
    # A form, as curl sends it by itself.
    refused = json.loads(_curl(f"{address}/v1/embeddings", "-d", "{}"))
    assert "send application/json" in refused["error"]["message"]


def test_sigterm_lets_calls_end_and_the_exit_code_is_0(folder: Path) -> None:
    openai = pytest.importorskip("openai")
    with served(folder / "chat", "--budget", "4GB", "--log-format", "json") as (address, process):
        with openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0) as client:
            asked = {"model": "chat", "messages": _MESSAGES, "max_tokens": 40}
            stream = iter(client.chat.completions.create(**asked, stream=True))
            pieces = [next(stream)]
            process.send_signal(signal.SIGTERM)
            pieces += list(stream)
            assert pieces[-1].choices[0].finish_reason in ("length", "stop")
        _, errors = process.communicate(timeout=_PATIENCE_S)
        assert process.returncode == 0, errors
        lines = [json.loads(line) for line in errors.splitlines()]
        (line,) = [line for line in lines if "route" in line]
        assert line["status"] == 200
        assert line["completion_tokens"] > 0


def test_a_model_that_cannot_be_opened_ends_the_server_with_its_error(folder: Path) -> None:
    with served(folder / "chat", "--budget", "1MB") as (_, process):
        _, errors = process.communicate(timeout=_PATIENCE_S)
        assert process.returncode == 1
        assert errors.splitlines()[-1].startswith("error: ")
        assert "budget" in errors


def test_a_port_that_is_taken_is_named(folder: Path, address: str) -> None:
    port = address.rpartition(":")[2]
    done = subprocess.run(
        [sys.executable, "-m", "pipeload", "serve", str(folder / "chat"), "--port", port],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=_PATIENCE_S,
        check=False,
    )
    assert done.returncode == 1
    assert f"error: 127.0.0.1:{port} cannot be listened on" in done.stderr


def test_a_second_signal_ends_calls_at_once(folder: Path) -> None:
    openai = pytest.importorskip("openai")
    with served(folder / "chat", "--budget", "4GB") as (address, process):
        with openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0) as client:
            asked = {"model": "chat", "messages": _MESSAGES, "max_tokens": 90, "n": 8, "temperature": 1}
            stream = iter(client.chat.completions.create(**asked, stream=True))
            next(stream)
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGINT)
            with suppress(openai.APIError, httpx2.HTTPError):
                list(stream)
        process.communicate(timeout=_PATIENCE_S)
        assert process.returncode == 0
