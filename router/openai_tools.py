"""Tools that a chat offers, and what it says of their use."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from core.errors import InvalidRequestError
from text.grammar import Structure
from text.tokenizer import Tokenizer
from text.tools.calls import Tool, ToolCallParser
from text.tools.formats import FORMATS, FormatName, ToolFormat, format_of_template

MAX_TOOLS = 128
_NAME_PATTERN = "[A-Za-z0-9_.-]{1,64}"
_NAME = re.compile(_NAME_PATTERN)
_NAMED = {"type": "object", "required": ["name"], "properties": {"name": {"pattern": f"^{_NAME_PATTERN}$"}}}
_FUNCTION = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": {"type": "string", "pattern": f"^{_NAME_PATTERN}$"},
        "description": {"type": ["string", "null"]},
        "parameters": {"type": ["object", "null"]},
    },
}
TOOLS_SCHEMA = {
    "anyOf": [
        {
            "type": "array",
            "maxItems": MAX_TOOLS,
            "items": {
                "type": "object",
                "required": ["type", "function"],
                "properties": {"type": {"const": "function"}, "function": _FUNCTION},
            },
        },
        {"type": "null"},
    ]
}
TOOL_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": ["none", "auto", "required", None]},
        {
            "type": "object",
            "required": ["type", "function"],
            "properties": {"type": {"const": "function"}, "function": _NAMED},
        },
    ]
}
"""These two are for the OpenAPI document."""


class ToolBody(Protocol):
    """The fields of a chat's body that matter here."""

    tool_choice: str | dict[str, Any] | None
    parallel_tool_calls: bool | None


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How calls come out of one answer. `structure` forces them; `reported` where their end is a finish reason.

    With `single`, calls after the first are dropped.
    """

    parser: Callable[[], ToolCallParser]
    structure: Structure | None
    reported: bool
    single: bool


class ToolCalling:
    """What the served model can do with tools: by its chat template, and the format that it writes calls in."""

    def __init__(self, tokenizer: Tokenizer, format_name: FormatName | None) -> None:
        """Without a `format_name` it is read off the chat template."""
        self._tokenizer = tokenizer
        template = tokenizer.chat_template
        name = format_name or (format_of_template(template.source) if template else None)
        self.format: ToolFormat | None = FORMATS[name] if name else None

    def offered(
        self, definitions: list[dict[str, Any]] | None, choice: str | dict[str, Any] | None = None
    ) -> tuple[Tool, ...]:
        """The tools for the prompt. `InvalidRequestError` for what is no tool, and for a model that can't have any."""
        tools = tools_of(definitions)
        if not tools and choice not in (None, "none", "auto"):
            raise InvalidRequestError("tool_choice", choice, "must be left out, or 'none', without tools")
        if not tools or choice == "none":
            return ()
        template = self._tokenizer.chat_template
        if template is not None and not template.reads("tools"):
            fix = "must be left out: this model's chat template has no place for them"
            raise InvalidRequestError("tools", [tool.name for tool in tools], fix)
        return tools

    def use(self, body: ToolBody, tools: tuple[Tool, ...]) -> ToolUse | None:
        """None where there are none."""
        if not tools:
            return None
        names = [tool.name for tool in tools]
        if self.format is None:
            fix = "can't be served: set router.tool_call_parser to the format in which this model writes calls"
            raise InvalidRequestError("tools", names, fix)
        chosen, single = chosen_tools(body.tool_choice, tools), body.parallel_tool_calls is False
        if chosen is None:
            make = self.format.parser
            return ToolUse(lambda: make(names), None, reported=True, single=single)
        named = isinstance(body.tool_choice, dict)
        limit = {"max_calls": 1} if named or single else {}
        grammar = self.format.grammar(chosen, is_token=self._tokenizer.is_token, **limit)
        forced = self.format.forced_parser
        structure = Structure("grammar", grammar, "tools")
        return ToolUse(lambda: forced(names), structure, reported=not named, single=single)


def tools_of(value: list[dict[str, Any]] | None) -> tuple[Tool, ...]:
    if value and len(value) > MAX_TOOLS:
        raise InvalidRequestError("tools", f"{len(value)} tools", f"must be at most {MAX_TOOLS}")
    tools = tuple(_tool(f"tools[{i}]", item) for i, item in enumerate(value or []))
    names = [tool.name for tool in tools]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise InvalidRequestError(f"tools[{i}].function.name", name, "must not be there twice")
    return tools


def _tool(path: str, value: dict[str, Any]) -> Tool:
    match value:
        case {"type": "function", "function": {"name": str(name), **others}}:
            parameters = others.get("parameters")
        case _:
            raise InvalidRequestError(path, value, "must be {'type': 'function', 'function': {'name': ..., ...}}")
    if not _NAME.fullmatch(name):
        fix = "must have 1 to 64 letters, digits, and _ . -"
        raise InvalidRequestError(f"{path}.function.name", name, fix)
    if parameters is None:
        parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(parameters, dict):
        raise InvalidRequestError(f"{path}.function.parameters", parameters, "must be a JSON schema of an object")
    if not isinstance(others.get("description", ""), str | None):
        raise InvalidRequestError(f"{path}.function.description", others["description"], "must be a string")
    return Tool(name, json.dumps(value, ensure_ascii=False), json.dumps(parameters))


def chosen_tools(choice: str | dict[str, Any] | None, tools: tuple[Tool, ...]) -> tuple[Tool, ...] | None:
    """Those of which one must be called; None where the model decides."""
    match choice:
        case None | "auto":
            return None
        case "required":
            return tools
        case {"type": "function", "function": {"name": str(name)}}:
            if named := tuple(tool for tool in tools if tool.name == name):
                return named
            known = ", ".join(tool.name for tool in tools)
            raise InvalidRequestError("tool_choice.function.name", name, f"must be one of tools: {known}")
        case _:
            fix = "must be 'none', 'auto', 'required' or {'type': 'function', 'function': {'name': ...}}"
            raise InvalidRequestError("tool_choice", choice, fix)
