"""Messages of a chat, as the OpenAI API writes them."""

from __future__ import annotations

import json
from typing import Any

from core.errors import InvalidRequestError
from text.chat_template import ChatMessage, ToolCall

MAX_MESSAGES = 4096
MAX_CALLS = 128
"""In one message."""

_TEXT_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}
_CALL = {
    "type": "object",
    "required": ["function"],
    "properties": {
        "id": {"type": ["string", "null"]},
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "required": ["name", "arguments"],
            "properties": {"name": {"type": "string"}, "arguments": {"type": "string"}},
        },
    },
}
_TEXT = {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": _TEXT_PART}]}
_NAME = {"type": ["string", "null"]}


def _role_schema(role: str, required: list[str], **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["role", *required],
        "properties": {"role": {"const": role}, "name": _NAME, **properties},
        "additionalProperties": {"enum": [None, [], {}]},
    }


MESSAGES_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_MESSAGES,
    "items": {
        "anyOf": [
            *(_role_schema(role, ["content"], content=_TEXT) for role in ("system", "developer", "user")),
            _role_schema("assistant", ["content"], content=_TEXT, tool_calls={"enum": [None, []]}),
            _role_schema(
                "assistant",
                ["tool_calls"],
                content={"anyOf": [*_TEXT["anyOf"], {"type": "null"}]},
                tool_calls={"type": "array", "minItems": 1, "maxItems": MAX_CALLS, "items": _CALL},
            ),
            _role_schema("tool", ["content"], content=_TEXT, tool_call_id=_NAME),
        ]
    },
}
"""For the OpenAPI document."""
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


def messages_of(value: object) -> tuple[ChatMessage, ...]:
    if not isinstance(value, list) or len(value) > MAX_MESSAGES:
        raise InvalidRequestError("messages", value, f"must be an array of at most {MAX_MESSAGES} messages")
    return tuple(_message(f"messages[{i}]", item) for i, item in enumerate(value))


def _message(path: str, value: object) -> ChatMessage:
    if not isinstance(value, dict):
        raise InvalidRequestError(path, value, "must be an object with role and content")
    role = value.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise InvalidRequestError(f"{path}.role", role, f"must be one of {', '.join(_ROLES)}")
    known = {"role", "content", "name", *{"assistant": ["tool_calls"], "tool": ["tool_call_id"]}.get(role, [])}
    for name, item in value.items():
        if name not in known and item not in (None, [], {}):
            raise InvalidRequestError(f"{path}.{name}", item, f"is not supported in a message of role {role}")
    calls = _calls(f"{path}.tool_calls", value.get("tool_calls") or []) if role == "assistant" else ()
    content = value.get("content")
    return ChatMessage(
        _ROLES[role],
        "" if content is None and calls else _content(f"{path}.content", content),
        name=_text(f"{path}.name", value.get("name")),
        tool_calls=calls,
        tool_call_id=_text(f"{path}.tool_call_id", value.get("tool_call_id")) if role == "tool" else "",
    )


def _text(path: str, value: object) -> str:
    if value is not None and not isinstance(value, str):
        raise InvalidRequestError(path, value, "must be a string")
    return value or ""


def _calls(path: str, value: object) -> tuple[ToolCall, ...]:
    if not isinstance(value, list) or len(value) > MAX_CALLS:
        raise InvalidRequestError(path, value, f"must be an array of at most {MAX_CALLS} calls")
    return tuple(_call(f"{path}[{i}]", item) for i, item in enumerate(value))


def _call(path: str, value: Any) -> ToolCall:
    match value:
        case {"function": {"name": str(name), "arguments": str(arguments)}} if (
            value.get("type", "function") == "function"
        ):
            try:
                if isinstance(json.loads(arguments or "{}"), dict):
                    return ToolCall(_text(f"{path}.id", value.get("id")), name, arguments)
            except (ValueError, RecursionError):
                pass
            raise InvalidRequestError(f"{path}.function.arguments", arguments, "must be a JSON object")
        case _:
            fix = "must be {'id', 'type': 'function', 'function': {'name', 'arguments': a JSON object as a string}}"
            raise InvalidRequestError(path, value, fix)


def _content(path: str, value: object) -> str:
    """A string, or an array of text parts, which belong together."""
    match value:
        case str():
            return value
        case [*parts] if parts:
            return "".join(_part(f"{path}[{i}]", part) for i, part in enumerate(parts))
        case _:
            raise InvalidRequestError(path, value, "must be a string or an array of text parts")


def _part(path: str, value: object) -> str:
    match value:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": str(kind)} if kind != "text":
            raise InvalidRequestError(f"{path}.type", kind, "must be 'text': other input is not supported yet")
        case _:
            raise InvalidRequestError(path, value, "must be {'type': 'text', 'text': a string}")
