"""Fields of `/v1/responses`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from tests.clients.rows.row import Row, cannot, nothing, refuses, works
from tests.clients.rows.texts import SAID

__all__ = ["RESPONSES", "RESPONSE_ROWS"]

RESPONSES = "/v1/responses"
_BASE: Mapping[str, Any] = {"model": "chat", "input": SAID, "max_output_tokens": 8}
_TEXT = {"type": "input_text", "text": SAID}


def _response_rows() -> list[Row]:
    take, refuse = partial(works, RESPONSES, _BASE), partial(refuses, RESPONSES, _BASE)
    say = partial(nothing, RESPONSES, _BASE)
    return [
        take("model", "gpt-4o-mini", "a name or an alias", lambda a, _: a.body["model"] == "gpt-4o-mini"),
        refuse("model", "gpt-5", "404: it is not here", "There is no model 'gpt-5' here", status=404),
        take("input", [{"role": "user", "content": SAID}], "messages", lambda a, b: a.texts == b.texts),
        take(
            "input",
            [{"type": "message", "role": "user", "content": [_TEXT]}],
            "parts of type `input_text`",
            lambda a, b: a.texts == b.texts,
        ),
        take(
            "input",
            [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": SAID},
                {
                    "type": "message",
                    "role": "assistant",
                    "id": "msg_1",
                    "status": "completed",
                    "content": [{"type": "output_text", "text": "Paris.", "annotations": []}],
                },
                {"role": "user", "content": "And of Italy?"},
            ],
            "earlier turns, as answers have them",
            lambda a, b: a.prompt_tokens > b.prompt_tokens,
        ),
        refuse(
            "input",
            [{"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,AA=="}]}],
            "images: models read text",
            "has a part of type 'input_image'",
        ),
        refuse(
            "input",
            [{"type": "function_call_output", "call_id": "call_1", "output": "x"}],
            "items that are no messages",
            "has the type 'function_call_output'; only messages are read",
        ),
        take("instructions", "Be brief.", "a first message", lambda a, b: a.prompt_tokens > b.prompt_tokens),
        take("max_output_tokens", 3, "at most so long", lambda a, _: a.usage["output_tokens"] == 3),
        take("temperature", 1.5, "draws", lambda a, b: a.texts != b.texts),
        take("temperature", 0, "takes the likeliest tokens", lambda a, b: a.texts == b.texts),
        take("top_p", 1e-6, "draws of fewer tokens", lambda a, b: a.texts == b.texts, temperature=1.5),
        take("stream", True, "comes as events", lambda a, b: len(a.events) > 1 and a.texts == b.texts),
        take(
            "stream_options",
            {"include_obfuscation": False},
            "no effect: events are not padded",
            lambda a, b: a.texts == b.texts,
            stream=True,
        ),
        take("metadata", {"a": "b"}, "comes back", lambda a, _: a.body["metadata"] == {"a": "b"}),
        *say("free text", text={"format": {"type": "text"}}),
        *cannot(
            RESPONSES,
            _BASE,
            "JSON: in `/v1/chat/completions`",
            text={"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
        ),
        *say("no functions", tools=[], tool_choice="auto", parallel_tool_calls=True),
        *cannot(
            RESPONSES,
            _BASE,
            "functions: in `/v1/chat/completions`",
            tools=[{"type": "function", "name": "feed", "parameters": {"type": "object"}, "strict": True}],
            tool_choice="required",
            max_tool_calls=2,
        ),
        *say("no thoughts", reasoning={"effort": "none"}),
        *cannot(RESPONSES, _BASE, "models have no levels of thought", reasoning={"effort": "high"}),
        *say("nothing more", include=[]),
        *cannot(RESPONSES, _BASE, "there is nothing to include", include=["message.output_text.logprobs"]),
        *cannot(RESPONSES, _BASE, "in `/v1/chat/completions`", top_logprobs=2),
        *say("a text that is too long is refused", truncation="disabled"),
        *cannot(RESPONSES, _BASE, "no turn is left out", truncation="auto"),
        *cannot(
            RESPONSES,
            _BASE,
            "no turn is left out or shortened",
            context_management=[{"type": "compaction"}],
            image={"context_compression": "auto"},
        ),
        *say("answers are waited for", background=False),
        *cannot(
            RESPONSES,
            _BASE,
            "answers are not kept: send all turns",
            background=True,
            background_options={"completion_window": "soonest"},
            previous_response_id="resp_1",
            conversation="conv_1",
            prompt={"id": "pmpt_1"},
        ),
        *cannot(RESPONSES, _BASE, "no model here judges texts", moderation={"model": "omni-moderation-latest"}),
        *cannot(RESPONSES, _BASE, "models have no programs of access", access_programs={"cyber": "standard"}),
        *say(
            "no effect",
            store=False,
            user="me",
            service_tier="flex",
            safety_identifier="me",
            prompt_cache_key="me",
        ),
        *say(
            "no effect: texts are kept while there is memory",
            prompt_cache_retention="24h",
            prompt_cache_options={"mode": "implicit", "ttl": "30m"},
        ),
        refuse("colour", "red", "an unknown field", "unknown field `colour`"),
    ]


RESPONSE_ROWS = _response_rows()
