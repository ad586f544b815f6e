"""Bodies of /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import PlainValidator, WithJsonSchema

from router.openai_messages import MESSAGES_SCHEMA, messages_of
from router.openai_requests import Fields, chat_of, parse_body, parse_json
from router.openai_tools import TOOLS_SCHEMA
from router.validation import Prompt
from text.chat_template import ChatMessage
from text.tools.calls import Tool


class TokenizeBody(Fields):
    """Special tokens are added, unless the client says otherwise."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    def as_prompt(self, _: Sequence[Tool]) -> Prompt:
        return self.prompt


class TokenizeChatBody(Fields):
    """Special tokens are those of the chat template, unless the client says otherwise."""

    messages: Annotated[tuple[ChatMessage, ...], PlainValidator(messages_of), WithJsonSchema(MESSAGES_SCHEMA)]
    model: str | None = None
    tools: Annotated[list[dict[str, Any]] | None, WithJsonSchema(TOOLS_SCHEMA)] = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    def as_prompt(self, tools: Sequence[Tool]) -> Prompt:
        return chat_of(self, tools)


class DetokenizeBody(Fields):
    tokens: list[int]
    model: str | None = None


def parse_tokenize(raw: bytes) -> TokenizeBody | TokenizeChatBody:
    """A chat where there are messages, else a text. `InvalidRequestError`."""
    data = parse_json(raw)
    return parse_body(TokenizeChatBody, raw) if "messages" in data else parse_body(TokenizeBody, raw)
