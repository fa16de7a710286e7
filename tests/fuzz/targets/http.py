"""Bodies of requests to the server's routes, with two tiny models that really answer."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from tests.engine.serve.client import Client, running, settings
from tests.engine.serve.strange import BODIES
from tests.engine.tasks.fakes import WORDS, write_bert_tokenizer, write_gpt_tokenizer, write_json
from tests.engine.toy import VOCABULARY, make_toy
from tests.fuzz.mutations import json_of
from tests.fuzz.target import Target, Trial, Wrong

_TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
_STEADY = {"model": "chat", "prompt": [5, 6], "max_tokens": 2}
_EACH = 500
_MOST_TOKENS = 64
_RUNNING: list[Any] = []
"""A context that nothing refers to would end."""


def _seeds() -> list[bytes]:
    """A body for each route, behind the route's path."""
    extra = [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "n": 1}),
        ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 1, "echo": True, "logit_bias": {"1": 2}}),
        ("/v1/embeddings", {"model": "embedder", "input": [[5, 6]], "encoding_format": "float"}),
        ("/tokenize", {"model": "chat", "messages": [{"role": "user", "content": "x"}], "return_token_strs": True}),
    ]  # fmt: skip
    return [f"{path}\n{json.dumps(body)}".encode() for path, body in [*BODIES.items(), *extra]]


def _mutate(chance: Random, pool: Sequence[bytes]) -> bytes:
    """JSON with parts exchanged, to its own route or another one."""
    path, _, body = chance.choice(pool).partition(b"\n")
    if chance.random() < 0.03:
        path = chance.choice(pool).partition(b"\n")[0]
    return path + b"\n" + json_of(chance, [body])


def _models(folder: Path) -> tuple[Path, Path]:
    from tokenizers import Tokenizer

    chat = make_toy(folder / "chat", blocks=1, width=16, decoder=True)
    words = {word: number for number, word in enumerate([*WORDS, *(f"w{n}" for n in range(VOCABULARY - len(WORDS)))])}
    write_gpt_tokenizer(chat, chat_template=_TEMPLATE)
    model = json.loads((chat / "tokenizer.json").read_bytes())
    model |= {"added_tokens": [], "model": {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"}}
    model |= {"pre_tokenizer": {"type": "Whitespace"}, "decoder": None, "post_processor": None}
    Tokenizer.from_str(json.dumps(model)).save(str(chat / "tokenizer.json"))
    write_json(chat, "config.json", {"max_position_embeddings": _MOST_TOKENS, "vocab_size": VOCABULARY})
    embedder = make_toy(folder / "embedder", blocks=1, width=16)
    write_bert_tokenizer(embedder)
    write_json(embedder, "config.json", {"vocab_size": len(WORDS)})
    return chat, embedder


def _prepare() -> Trial:
    directories = _models(Path(tempfile.mkdtemp()))
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    server = running(settings(*directories))
    _RUNNING.append(server)
    client: Client = loop.run_until_complete(server.__aenter__())

    def steady() -> Any:
        answer = loop.run_until_complete(client.post("/v1/completions", _STEADY))
        return answer.status, answer.json()["choices"]

    expected, count = steady(), 0

    def trial(data: bytes) -> bool:
        nonlocal count
        count += 1
        path, _, body = data.partition(b"\n")
        answer = loop.run_until_complete(client.post(path.decode(errors="replace"), None, raw=body))
        if answer.status >= 500:
            raise Wrong(f"the answer is {answer.status}", answer.body[:500])
        if "Traceback" in answer.body.decode(errors="replace"):
            raise Wrong("the answer shows a traceback", answer.body[:500])
        if answer.status >= 400:
            error = answer.json()
            if set(error) != {"error"} or not error["error"]["message"]:
                raise Wrong("an error has another shape", error)
        elif answer.headers["content-type"].startswith("text/event-stream"):
            if any("internal_error" in str(event) for event in answer.events()):
                raise Wrong("a stream ends with the server's own fault", answer.body[-500:])
        else:
            json.loads(answer.body, parse_constant=_refuse)
        if client.application.desk.admission.places:
            raise Wrong("a call that has ended still has its place")
        if count % _EACH == 0 and steady() != expected:
            raise Wrong("a request that is in order gets another answer than before")
        return answer.status < 400

    return trial


def _refuse(constant: str) -> None:
    raise Wrong("an answer is no JSON", constant)


TARGETS = (
    Target(
        name="http", what="bodies of HTTP requests", prepare=_prepare, mutate=_mutate, seeds=_seeds, native=True,
        share=2, memory_bytes=3 << 30, limit_s=60,
    ),
)  # fmt: skip
