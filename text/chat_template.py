"""Chat templates: the Jinja source that a checkpoint ships, turning messages into one prompt."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from core.errors import CheckpointError, InvalidRequestError


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str


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
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"{origin}: chat template, line {error.lineno}: {error.message}") from error

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The prompt after which the assistant speaks next. `InvalidRequestError` where the template refuses."""
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._template.render(
                **self._variables, messages=turns, tools=None, documents=None, add_generation_prompt=True
            )
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            roles = [message.role for message in messages]
            fix = f"must suit the model's chat template, which says: {str(error).rstrip('.')}"
            raise InvalidRequestError("messages", roles, fix) from error


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
