"""What grammars of forced calls let through, by the engine's own matcher."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tokenizers
from llguidance import LLMatcher, LLTokenizer

from tests.text.conftest import byte_level
from text.grammar import GrammarCompiler, Structure
from text.tokenizer import Tokenizer
from text.tools.calls import Tool
from text.tools.formats import FORMATS

CITY = (
    '{"type": "object", "properties": {"city": {"enum": ["Ulm"]}}, "required": ["city"], "additionalProperties": false}'
)
TOOLS = (Tool("weather", "{}", CITY), Tool("now", "{}", '{"type": "object"}'))
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
LLAMA = '{"name": "weather", "parameters": {"city": "Ulm"}}'


def fits(backend: tokenizers.Tokenizer, name: Any, answer: str, max_calls: int = 4) -> bool:
    tokenizer = Tokenizer(backend, {})
    grammar = FORMATS[name].grammar(TOOLS, is_token=tokenizer.is_token, max_calls=max_calls)
    compiled = GrammarCompiler(tokenizer, backend.get_vocab_size(), (1,)).compile(
        Structure("grammar", grammar, "tools")
    )
    matcher = LLMatcher(LLTokenizer(backend.to_str(), eos_token=[1]), compiled)
    token_ids = backend.encode(answer, add_special_tokens=False).ids
    return (
        matcher.validate_tokens(token_ids) == len(token_ids)
        and matcher.consume_tokens(token_ids)
        and matcher.is_accepting()
    )


@pytest.mark.parametrize("tags", ["text", "tokens"])
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (HERMES, True),
        (f"{HERMES}\n{HERMES}", True),
        (HERMES.replace("Ulm", "Rom"), False),
        (HERMES.replace("weather", "else"), False),
        ("Let me see.", False),
    ],
)
def test_hermes(tags: str, answer: str, expected: bool) -> None:
    backend = byte_level()
    if tags == "tokens":
        backend.add_tokens(["<tool_call>", "</tool_call>"])
    assert fits(backend, "hermes", answer) is expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (LLAMA, True),
        (f"{LLAMA}; {LLAMA}", True),
        (LLAMA.replace('"Ulm"', "1"), False),
        (json.dumps({"answer": 1}), False),
    ],
)
def test_llama(answer: str, expected: bool) -> None:
    assert fits(byte_level(), "llama3_json", answer) is expected


def test_no_more_calls_than_allowed() -> None:
    assert not fits(byte_level(), "llama3_json", f"{LLAMA}; {LLAMA}", max_calls=1)
    assert not fits(byte_level(), "hermes", f"{HERMES}\n{HERMES}", max_calls=1)
