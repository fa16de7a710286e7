"""A server whose models are idle, and the process that takes its place."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.engine.harness import EMULATED, PATIENCE_S
from tests.engine.serve.client import Client, running, settings, with_server

import pipeload
from pipeload.errors import ConfigError, ManifestError
from pipeload.serve import HANDOVER
from pipeload.serve.handover import Handover, IdleConnection, hear_signals, read_handover, replace_process

_HEAVY = {"numpy", "onnxruntime", "tokenizers", "jinja2", "PIL", "llguidance", "typer", "rich"}
_ASKED = {"input": "the cat"}


@pytest.mark.skipif(EMULATED, reason="subprocesses do not work under qemu")
def test_a_server_without_models_imports_none_of_their_libraries() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import json, sys, pipeload.serve.server; print(json.dumps(sorted(sys.modules)))"],
        env={"PYTHONPATH": str(next(iter(pipeload.__path__)).removesuffix("/pipeload"))},
        capture_output=True,
        check=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert {name.partition(".")[0] for name in json.loads(done.stdout)}.isdisjoint(_HEAVY)


def _passed(handover: Handover) -> Handover:
    """As the next process reads it."""
    kept = os.memfd_create("test")
    os.write(kept, msgspec.json.encode(handover, enc_hook=str))
    read, caught = read_handover(f"{kept},{os.pipe()[0]}")
    os.close(caught)
    return read


def test_a_server_goes_on_where_the_one_before_it_ended(embedder: Path, chat_model: Path) -> None:
    chosen = settings(embedder, chat_model, idle_s=0.0, keys=("kéy".encode(),), log_format="json")
    headers = {"authorization": "Bearer kéy"}

    async def idle(client: Client) -> None:
        while not client.application.spent:
            await asyncio.wait_for(asyncio.sleep(0.001), PATIENCE_S)

    async def before(client: Client) -> tuple[Handover, Any, Any]:
        answer = await client.post("/v1/embeddings", _ASKED, headers=headers)
        described = await client.get("/openapi.json", headers=headers)
        await idle(client)
        return client.application.handover(7, [IdleConnection(descriptor=8, received=b"GET /")]), answer, described

    left, answer, described = with_server(chosen, before)
    found = _passed(left)
    assert found.settings == chosen
    assert (found.listening, found.connections) == (7, [IdleConnection(descriptor=8, received=b"GET /")])

    async def after() -> Handover:
        async with running(found.settings, handover=found) as client:
            application = client.application
            for path in ("/health", "/ready", "/metrics", "/nowhere"):
                assert (await client.get(path, headers=headers)).status == (404 if path == "/nowhere" else 200)
            models = (await client.get("/v1/models", headers=headers)).json()["data"]
            assert {one["state"] for one in models} == {"closed"}
            assert (await client.get("/openapi.json", headers=headers)).body == described.body
            assert not application.work.routes
            assert not application.spent
            assert (await client.post("/v1/embeddings", _ASKED)).status == 401
            assert not application.work.routes
            assert (await client.post("/v1/embeddings", _ASKED, headers=headers)).json() == answer.json()
            text = (await client.get("/metrics", headers=headers)).body.decode().splitlines()
            for line in (
                'pipeload_requests_total{route="/v1/embeddings",status="200"} 2.0',
                'pipeload_requests_total{route="/v1/embeddings",status="401"} 1.0',
                'pipeload_request_seconds_count{route="/v1/embeddings"} 3.0',
                'pipeload_request_seconds_bucket{le="+Inf",route="/v1/embeddings"} 3.0',
                'pipeload_opened_total{model="embedder"} 3.0',
                'pipeload_opened_total{model="chat"} 1.0',
                'pipeload_sweeps_total{model="embedder"} 2.0',
                "pipeload_idled_total 1.0",
            ):
                assert line in text, line
            await idle(client)
            return application.handover(0, [])

    again = asyncio.run(after())
    assert {one.value for one in again.counts["pipeload_idled"]} == {1.0}
    assert again.models["embedder"].closed == 3


def test_a_model_that_would_not_be_found_again_keeps_the_process(toy_copy: Path) -> None:
    async def ask(client: Client) -> None:
        (toy_copy / "pipeload.json").unlink()
        with pytest.raises(ManifestError):
            client.application.handover(0, [])

    with_server(settings(toy_copy), ask)


@pytest.fixture
def handover(toy_copy: Path) -> Handover:
    with socket.socket() as listening:
        yield Handover(
            settings=settings(toy_copy),
            listening=listening.fileno(),
            connections=[],
            openapi=b"",
            work_paths=[],
            models={},
            counts={},
        )


def test_a_process_that_cannot_be_replaced_is_as_it_was(handover: Handover, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, str]] = []

    def refuse(program: str, arguments: list[str], environment: dict[str, str]) -> None:
        assert (program, arguments) == (sys.executable, [sys.executable, *sys.orig_argv[1:]])
        assert os.get_inheritable(handover.listening)
        told.append(environment)
        raise OSError("no such interpreter")

    monkeypatch.setattr(os, "execve", refuse)
    held = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    descriptors = sorted(Path("/proc/self/fd").iterdir())
    with pytest.raises(OSError, match="no such interpreter"):
        replace_process(handover, lambda: False)
    assert len(told) == 1
    assert HANDOVER not in os.environ
    assert not os.get_inheritable(handover.listening)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == held
    assert sorted(Path("/proc/self/fd").iterdir()) == descriptors
    replace_process(handover, lambda: True)
    assert len(told) == 1


def test_a_signal_that_a_thread_catches_at_the_last_moment_is_heard_by_the_next_process(
    handover: Handover, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[bool] = []
    done = threading.Event()
    thread = threading.Thread(target=done.wait, args=(PATIENCE_S,))

    def catch(_program: str, _arguments: list[str], environment: dict[str, str]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        # The signal is the other thread's, since this one holds it back.
        select.select([int(environment[HANDOVER].split(",")[1])], [], [], PATIENCE_S)
        copies = ",".join(str(os.dup(int(one))) for one in environment[HANDOVER].split(","))
        found, caught = read_handover(copies)
        assert found.listening == handover.listening
        heard.append(hear_signals(caught))
        raise OSError("enough")

    monkeypatch.setattr(os, "execve", catch)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    thread.start()
    try:
        with pytest.raises(OSError, match="enough"):
            replace_process(handover, lambda: False)
    finally:
        signal.signal(signal.SIGTERM, before)
        done.set()
        thread.join()
    assert heard == [True]


@pytest.mark.parametrize("told", ["", "x", "1000000,1000001"])
def test_a_variable_that_no_server_has_set_is_named(told: str) -> None:
    with pytest.raises(ConfigError, match=f"{HANDOVER} is '{told}', which no server has left"):
        read_handover(told)
