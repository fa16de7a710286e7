"""Rerank, classify, tokenize and responses over HTTP are those of the library; the OpenAPI file names them all."""

from __future__ import annotations

import base64
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine.serve.client import Client, settings, with_server
from tests.engine.serve.conftest import with_words
from tests.engine.tasks.fakes import write_json
from tests.models import made_once

import pipeload
from pipeload.serve.settings import LIMITS
from pipeload.tasks.text.tokenizer import tokenizer_of

_MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
_DOCUMENTS = ["Paris is the capital.", "A cat.", "France is a country, and so is Italy."]


@pytest.fixture(scope="session")
def classifier(exported_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny RoBERTa with two labels. The other fixture makes sure that models can be made here."""
    directory = tmp_path_factory.mktemp("classifier") / "classifier"
    return with_words(Path(shutil.copytree(made_once("roberta") / "roberta", directory)))


@pytest.fixture(scope="session")
def pictures(exported_llama: Path) -> Path:
    """A tiny ViT."""
    pytest.importorskip("PIL")
    return made_once("vit") / "vit"


def _picture(width: int = 40, height: int = 30, kind: str = "PNG") -> str:
    import PIL.Image

    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def test_texts_and_pairs_have_the_labels_of_classify(classifier: Path) -> None:
    async def ask(client: Client) -> list[Any]:
        bodies = [
            {"input": _DOCUMENTS, "top_k": None},
            {"input": "A cat."},
            {"input": {"text": "A cat.", "text_pair": "A dog."}, "top_k": 1, "model": "classifier"},
        ]
        return [(await client.post("/v1/classify", body)).json() for body in bodies]

    several, one, pair = with_server(settings(classifier), ask)
    with pipeload.load(classifier, "8GB") as model:
        expected = model.classify(_DOCUMENTS, top_k=None)
        of_pair = model.classify(("A cat.", "A dog."), top_k=1)
    for found, labels in zip(several["data"], expected, strict=True):
        assert [each["label"] for each in found["labels"]] == [each.label for each in labels]
        assert [each["score"] for each in found["labels"]] == pytest.approx([each.score for each in labels], abs=1e-5)
    assert one["data"][0]["labels"][0]["score"] == pytest.approx(expected[1][0].score, abs=1e-5)
    assert pair["data"][0]["labels"][0]["label"] == of_pair[0].label
    assert len(pair["data"][0]["labels"]) == 1


def test_images_have_the_labels_of_classify_and_are_never_fetched(pictures: Path) -> None:
    data = _picture()

    async def ask(client: Client) -> Any:
        path = "/v1/classify"
        found = []
        for image in (data, f"data:image/png;base64,{data}"):
            for item in (image, {"image": image}):
                found.append((await client.post(path, {"input": item})).json()["data"][0]["labels"])
        assert found == [found[0]] * 4
        for image, status, words in (
            ("http://127.0.0.1/cat.png", 400, "fetches nothing"),
            ("file:///etc/passwd", 400, "fetches nothing"),
            ("data:text/html;base64,AAAA", 400, "fetches nothing"),
            ("/etc/hostname", 400, "An image"),
            ("AAAA", 400, "An image cannot be read"),
            ("!", 400, "no base64"),
            (_picture(kind="TIFF"), 400, "An image cannot be read"),
            (_picture(8000, LIMITS.image_pixels // 8000 + 1, "JPEG"), 413, "pixels"),
            ("A" * (LIMITS.image_bytes * 4 // 3 + 8), 413, "more than"),
            ({"text": "A cat."}, 400, "takes images"),
        ):
            answer = await client.post(path, {"input": image})
            assert (answer.status, words in answer.message) == (status, True), (answer.status, answer.message)
        return found[0]

    labels = with_server(settings(pictures), ask)
    with pipeload.load(pictures, "8GB") as model:
        expected = model.classify(base64.b64decode(data))
    assert [each["label"] for each in labels] == [each.label for each in expected]


def test_what_cannot_be_ordered_is_refused(classifier: Path) -> None:
    query = "What is the capital of France?"

    async def ask(client: Client) -> None:
        answer = await client.post("/v1/rerank", {"query": query, "documents": _DOCUMENTS})
        assert answer.status == 400
        assert "one score for a pair, and this one has 2 labels" in answer.message
        for body, words in (
            ({"query": query, "documents": []}, "empty list"),
            ({"query": query, "documents": ["a"], "top_n": 0}, "at least 1"),
            ({"query": "a " * 10_000, "documents": ["a"] * 1000}, "20000 characters, which are read with each of 1000"),
            ({"query": query, "documents": ["a"], "max_chunks_per_doc": 3}, "max_chunks_per_doc"),
        ):
            assert words in (await client.post("/v1/rerank", body)).message
        assert (
            "raw_scores" in (await client.post("/rerank", {"query": "a", "texts": ["b"], "raw_scores": True})).message
        )

    with_server(settings(classifier), ask)


def test_scores_are_those_of_rerank(made_toys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is a stand-in for a cross-encoder: its score is the length of the document."""
    from pipeload.tasks.classify import rerank as reranking

    directory = Path(shutil.copytree(made_toys("toy"), tmp_path / "ranker"))
    with_words(directory)
    write_json(directory, "config.json", {"id2label": {"0": "score"}})
    monkeypatch.setattr(reranking, "check_scores_texts", lambda *_: None)
    monkeypatch.setattr(
        reranking, "text_logits", lambda _, pairs, __: [np.array([len(pair[1]) / 10], np.float32) for pair in pairs]
    )

    async def ask(client: Client) -> list[Any]:
        asked = {"model": "ranker", "query": "How long?", "documents": _DOCUMENTS}
        documents = [{"text": text} for text in _DOCUMENTS]
        return [
            (await client.post("/v1/rerank", asked)).json(),
            (
                await client.post("/v1/rerank", asked | {"documents": documents, "top_n": 2, "return_documents": True})
            ).json(),
        ]

    plain, short = with_server(settings(directory), ask)
    with pipeload.load(directory, "8GB") as model:
        ranked = model.rerank("How long?", _DOCUMENTS)
        tokens = sum(len(tokenizer_of(model).encode("How long?", text).ids) for text in _DOCUMENTS)
    found = [{"index": one.index, "relevance_score": one.score} for one in ranked]
    assert plain["results"] == found
    assert plain["usage"]["total_tokens"] == tokens
    assert short["results"] == [
        each | {"document": {"text": one.text}} for each, one in zip(found[:2], ranked, strict=False)
    ]


def test_tokens_are_those_of_the_tokenizer(chat_model: Path, embedder: Path) -> None:
    async def ask(client: Client) -> list[Any]:
        bodies = [
            {"model": "chat", "prompt": "The capital", "return_token_strs": True},
            {"model": "chat", "messages": _MESSAGES},
            {"model": "embedder", "prompt": "the cat"},
            {"model": "embedder", "prompt": "the cat", "add_special_tokens": False},
        ]
        assert "either prompt or messages" in (await client.post("/tokenize", {"model": "chat"})).message
        assert "names no model" in (await client.post("/tokenize", {"prompt": "x"})).message
        return [(await client.post("/tokenize", body)).json() for body in bodies]

    text, chat, special, plain = with_server(settings(chat_model, embedder), ask)
    with pipeload.load(chat_model, "8GB") as model:
        ids = list(tokenizer_of(model).encode("The capital").ids)
        assert (text["tokens"], text["count"]) == (ids, len(ids))
        assert "".join(text["token_strs"]) == "The capital"
        assert chat["tokens"] == model.chat_prompt(_MESSAGES)
    assert plain["tokens"] == special["tokens"][1:-1]
    assert special["max_model_len"] == 16


def test_a_response_is_the_answer_of_a_chat(chat_model: Path) -> None:
    async def ask(client: Client) -> tuple[Any, Any, Any, Any]:
        asked = {
            "input": _MESSAGES[0]["content"],
            "instructions": "Be brief.",
            "max_output_tokens": 6,
            "temperature": 0,
        }
        parts = [{"role": "user", "type": "message", "content": [{"type": "input_text", "text": asked["input"]}]}]
        plain = (await client.post("/v1/responses", asked)).json()
        listed = (await client.post("/v1/responses", asked | {"input": parts, "tools": []})).json()
        streamed = await client.post("/v1/responses", asked | {"stream": True})
        messages = [{"role": "system", "content": "Be brief."}, *_MESSAGES]
        chat = (
            await client.post("/v1/chat/completions", {"messages": messages, "max_tokens": 6, "temperature": 0})
        ).json()
        for field, value in (
            ("previous_response_id", "resp_1"),
            ("background", True),
            ("tools", [{"type": "web_search"}]),
            ("text", {"format": {"type": "json_object"}}),
            ("reasoning", {"effort": "high"}),
        ):
            refused = await client.post("/v1/responses", asked | {field: value})
            assert (refused.status, refused.json()["error"]["param"]) == (400, field)
        item = [{"type": "function_call_output", "call_id": "x", "output": "y"}]
        assert "only messages" in (await client.post("/v1/responses", asked | {"input": item})).message
        return plain, listed, streamed.events(), chat

    plain, listed, events, chat = with_server(settings(chat_model), ask)
    assert plain["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert plain["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert plain["usage"]["output_tokens"] == 6
    assert (plain["status"], plain["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert listed["output"][0]["content"] == plain["output"][0]["content"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = list(dict.fromkeys(event["type"].removeprefix("response.") for event in events))
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "incomplete",
    ]
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert text == plain["output"][0]["content"][0]["text"]
    assert events[-1]["response"]["output"][0]["content"] == plain["output"][0]["content"]


def test_the_openapi_file_has_every_route_and_only_known_parts(chat_model: Path) -> None:
    async def ask(client: Client) -> tuple[Any, set[str]]:
        paths = {route.path for route in client.application.routes}
        return (await client.get("/openapi.json")).json(), paths

    described, paths = with_server(settings(chat_model), ask)
    assert described["paths"].keys() == {path.replace(":path", "") for path in paths}
    text = str(described)
    known = described["components"]["schemas"]
    assert {"ChatRequest", "ChatAnswer", "EmbeddingsRequest", "ErrorAnswer", "RerankRequest"} <= known.keys()
    for name in {part.split("'")[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in known
    body = described["paths"]["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/EmbeddingsRequest"}
    assert known["EmbeddingsRequest"]["required"] == ["input"]
