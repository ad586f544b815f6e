"""Chat templates: the Jinja source that a checkpoint ships, turning messages into one prompt."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from core.errors import CheckpointError, InvalidRequestError

MAX_TEMPLATE_CHARACTERS = 2**22
"""Of a prompt that a template makes."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the assistant made. `arguments` is JSON."""

    call_id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """`tool_call_id` says which call a message of role `tool` answers."""

    role: str
    content: str
    name: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages, and what else a chat template is given, as JSON: the definitions of tools and documents, and an object
    of further variables. With `continue_last` the last message is not over: the model goes on writing it."""

    messages: tuple[ChatMessage, ...]
    tools: tuple[str, ...] = ()
    documents: tuple[str, ...] = ()
    variables: str = ""
    add_generation_prompt: bool = True
    continue_last: bool = False


class ChatTemplate:
    """Compiled once. Renders in a sandbox, under the conventions that published templates are written for.

    Blocks are trimmed; `break` and `continue` work; `raise_exception(message)`, `strftime_now(format)` and a `tojson`
    that leaves HTML and non-ASCII characters alone are there; `{% generation %}` marks nothing. `special_tokens` are
    variables: bos_token, eos_token and so on. `now` is what `strftime_now` reads. Raises `CheckpointError`.
    """

    def __init__(
        self, source: str, *, origin: str, special_tokens: Mapping[str, str], now: Callable[[], datetime]
    ) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda format: now().strftime(format)  # noqa: A006 - named so
        self._variables = dict(special_tokens)
        self.source = source
        try:
            self._template = environment.from_string(source)
            self._names = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"{origin}: chat template, line {error.lineno}: {error.message}") from error

    def reads(self, variable: str) -> bool:
        """Whether the template looks at `variable`."""
        return variable in self._names

    def render(self, chat: Chat) -> str:
        """The prompt after which the assistant speaks next. `InvalidRequestError` where the template refuses."""
        try:
            prompt = self._template.render(
                **(json.loads(chat.variables) if chat.variables else {}) | self._variables,
                messages=[_turn(message) for message in chat.messages],
                tools=[json.loads(tool) for tool in chat.tools] or None,
                documents=[json.loads(document) for document in chat.documents] or None,
                add_generation_prompt=chat.add_generation_prompt,
            )
        except (
            *(jinja2.TemplateError, ArithmeticError, AttributeError, LookupError),
            *(TypeError, ValueError, RecursionError),
        ) as error:
            roles = [message.role for message in chat.messages]
            fix = f"must suit the model's chat template, which says: {str(error).rstrip('.')}"
            raise InvalidRequestError("messages", roles, fix) from error
        if len(prompt) > MAX_TEMPLATE_CHARACTERS:
            fix = f"must make a prompt of at most {MAX_TEMPLATE_CHARACTERS} characters"
            raise InvalidRequestError("messages", f"{len(prompt)} characters", fix)
        return _up_to_last(prompt, chat.messages[-1].content) if chat.continue_last else prompt


def _turn(message: ChatMessage) -> dict[str, Any]:
    """A message as templates know it; what is not there has no key, for they ask for that."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": call.call_id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.loads(call.arguments or "{}")},
            }
            for call in message.tool_calls
        ]
    for name in ("name", "tool_call_id"):
        if value := getattr(message, name):
            turn[name] = value
    return turn


def _up_to_last(prompt: str, content: str) -> str:
    """The prompt without what the template puts behind the last message."""
    text = content.strip()
    position = prompt.rfind(text)
    if not text or position < 0:
        fix = "must end with a message whose text the chat template shows, to be continued"
        raise InvalidRequestError("messages", content, fix)
    return prompt[: position + len(text)]


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


class _GenerationTag(Extension):
    """`{% generation %}` ... `{% endgeneration %}` marks the assistant's words for training; here its body is all."""

    tags: set[str] = {"generation"}  # noqa: RUF012 - declared so by Jinja

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def template_source(config: Mapping[str, Any], origin: str) -> str | None:
    """The `chat_template` of a tokenizer_config.json: a string, or a list of named ones of which we take `default`."""
    match config.get("chat_template"):
        case None:
            return None
        case str(source):
            return source
        case [{"template": str(source)}]:
            return source
        case [*named] if all(isinstance(entry, dict) and isinstance(entry.get("template"), str) for entry in named):
            by_name = {entry.get("name"): entry["template"] for entry in named}
            if "default" in by_name:
                return str(by_name["default"])
            raise CheckpointError(f"{origin}: chat_template has {sorted(map(str, by_name))}, none is named 'default'")
        case _:
            raise CheckpointError(f"{origin}: chat_template must be a string, or a list of named templates")
