"""The ways in which models write calls of tools, by the names that vLLM gives their parsers."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from text.tools.calls import Tool, ToolCallParser
from text.tools.hermes import BEGIN, END, HermesParser
from text.tools.llama import PYTHON_TAG, LlamaJsonParser, PythonicParser

FormatName = Literal["hermes", "llama3_json", "pythonic"]
MAX_CALLS = 64
"""In one answer that must hold some."""
_SPACES = r"[ \n\t]{0,20}"


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How one family of models writes calls.

    `parser(names)` reads what a model wrote of its own accord. An answer that must be calls is `before`, the JSON of a
    name, of `key` and the arguments, and `after`, with `between` two of them; `forced_parser(names)` reads that.
    """

    name: FormatName
    parser: Callable[[Collection[str]], ToolCallParser]
    forced_parser: Callable[[Collection[str]], ToolCallParser]
    key: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    between: str

    def grammar(self, tools: Sequence[Tool], *, is_token: Callable[[str], bool], max_calls: int = MAX_CALLS) -> str:
        """Lark in llguidance's dialect for an answer that calls one of `tools`, or several up to `max_calls`.

        `is_token(text)`: whether the tokenizer has a token of its own for it, which a grammar must name.
        """

        def literal(text: str) -> str:
            return text if text.startswith("<") and is_token(text) else json.dumps(text)

        more = f" ({json.dumps(self.between)} call){{0,{max_calls - 1}}}" if max_calls > 1 else ""
        rules = [f"start: call{more}", f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}"]
        for i, tool in enumerate(tools):
            opening = json.dumps(f'{{"name": {json.dumps(tool.name)}, "{self.key}": ')
            parts = [*map(literal, self.before), opening, f"arguments_{i}", '"}"', *map(literal, self.after)]
            blanks = {"whitespace_flexible": False, "whitespace_pattern": _SPACES}
            schema = {**json.loads(tool.parameters), "x-guidance": blanks}
            rules += [f"call_{i}: {' '.join(parts)}", f"arguments_{i}: %json {json.dumps(schema)}"]
        return "\n".join(rules)


_LLAMA_JSON = ("parameters", (), (), "; ")
FORMATS: dict[FormatName, ToolFormat] = {
    "hermes": ToolFormat(
        "hermes",
        lambda _: HermesParser(),
        lambda _: HermesParser(),
        "arguments",
        (BEGIN, "\n"),
        ("\n", END),
        "\n",
    ),
    "llama3_json": ToolFormat("llama3_json", LlamaJsonParser, LlamaJsonParser, *_LLAMA_JSON),
    "pythonic": ToolFormat("pythonic", PythonicParser, LlamaJsonParser, *_LLAMA_JSON),
}


def format_of_template(source: str) -> FormatName | None:
    """The format that a chat template asks for, by what it shows the model; None where it shows none we know."""
    if BEGIN in source:
        return "hermes"
    if PYTHON_TAG in source or '"parameters": dictionary of argument' in source:
        return "llama3_json"
    if "func_name1(params_name1=" in source:
        return "pythonic"
    return None
