"""Bodies of `/tokenize`."""

from __future__ import annotations

from typing import Any

import msgspec

from pipeload.serve.bodies.chat import Message

__all__ = ["TokenizeAnswer", "TokenizeRequest"]


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A text, or a conversation by the model's chat template, to turn into tokens.

    Attributes:
        model: a name of `/v1/models`; may be left out where there is one model.
        prompt: the text.
        messages: the conversation, in the place of a text.
        add_special_tokens: add the tokens that the tokenizer puts around a text.
        return_token_strs: the answer has the tokens' texts, too.
        add_generation_prompt: a conversation always ends with the beginning of an answer.
    """

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False
    add_generation_prompt: Any = None
    continue_final_message: Any = None
    chat_template: Any = None
    chat_template_kwargs: Any = None
    mm_processor_kwargs: Any = None
    tools: Any = None


class TokenizeAnswer(msgspec.Struct, kw_only=True):
    """Token ids.

    Attributes:
        max_model_len: the most tokens that the model takes; null where it has no limit.
    """

    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None = None
