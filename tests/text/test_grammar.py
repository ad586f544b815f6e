"""Structures as clients write them: what becomes of them, and which are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tokenizers
from llguidance import LLMatcher, LLTokenizer

from core.errors import InvalidRequestError
from text.grammar import MAX_CHARACTERS, GrammarCompiler, Structure
from text.tokenizer import Tokenizer

EOS = 1
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.fixture(scope="module")
def tokenizer(byte_level_backend: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(byte_level_backend, {})


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.vocab_size, (EOS,))


def accepts(tokenizer: Tokenizer, grammar: str, text: str) -> bool:
    backend = LLTokenizer(tokenizer.to_json(), eos_token=[EOS])
    matcher = LLMatcher(backend, grammar, log_level=0)
    tokens = backend.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("kind", "text", "good", "bad"),
    [
        ("json_schema", json.dumps(SCHEMA), ['{"a": 5}', '{"a":5, "b": [true]}', '{\n  "a": 5\n}'], ['{"b": 5}', "5"]),
        ("json_schema", '{"type": "object"}', ["{}", '{"x": null}'], ["[]", '{"x": }']),
        ("regex", "[ab]{2}/c", ["ab/c"], ["ab", "abc"]),
        (
            "choice",
            json.dumps(['yes "no"', "水門", "a|b", "new\nline"]),
            ['yes "no"', "水門", "a|b", "new\nline"],
            ["yes", "a"],
        ),
        ("grammar", 'start: "x" num\nnum: /[0-9]+/', ["x42"], ["x"]),
        ("grammar", 'root ::= "x" num\nnum ::= [0-9]+', ["x42"], ["x"]),
    ],
)
def test_texts_that_fit_are_told_from_those_that_do_not(
    compiler: GrammarCompiler, tokenizer: Tokenizer, kind: Any, text: str, good: list[str], bad: list[str]
) -> None:
    grammar = compiler.compile(Structure(kind, text, "field"))
    assert [accepts(tokenizer, grammar, each) for each in good] == [True] * len(good)
    assert [accepts(tokenizer, grammar, each) for each in bad] == [False] * len(bad)
    assert compiler.compile(Structure(kind, text, "field")) == grammar


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        ("json_schema", "{", "must be valid"),
        ("json_schema", "[]", "a JSON schema is an object"),
        ("json_schema", '{"type": "wat"}', "Invalid type: wat"),
        ("json_schema", '{"allOf": [{"type": "string"}, {"type": "integer"}]}', "Unsatisfiable schema"),
        ("json_schema", '{"not": {"type": "string"}}', "Unimplemented keys"),
        ("regex", "((", "unclosed group"),
        ("regex", "", "must not be empty"),
        ("choice", "[]", "at least one text"),
        ("choice", '["a", ""]', "none may be empty"),
        ("grammar", "start: foo", "unknown name"),
        ("regex", "a" * (MAX_CHARACTERS + 1), "must have at most"),
    ],
)
def test_what_can_not_be_is_refused_with_the_reason(compiler: GrammarCompiler, kind: Any, text: str, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says) as error:
        compiler.compile(Structure(kind, text, "the_field"))
    assert error.value.field == "the_field"


def test_a_model_without_an_end_can_have_no_structure(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="names no end-of-sequence token"):
        GrammarCompiler(tokenizer, tokenizer.vocab_size, ()).compile(Structure("regex", "a", "regex"))


def test_a_model_whose_tokenizer_does_not_fit_can_have_no_structure(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="tokenizer can't serve one: vocab size too small"):
        GrammarCompiler(tokenizer, 50, (EOS,)).compile(Structure("regex", "a", "regex"))


def test_tokens_of_sentence_piece_are_read_as_their_text(sentence_piece_backend: tokenizers.Tokenizer) -> None:
    tokenizer = Tokenizer(sentence_piece_backend, {})
    grammar = GrammarCompiler(tokenizer, tokenizer.vocab_size, (2,)).compile(Structure("regex", " the é水+", "regex"))
    backend = LLTokenizer(tokenizer.to_json(), eos_token=[2])
    matcher = LLMatcher(backend, grammar, log_level=0)
    tokens = tokenizer.encode("the é水水", add_special_tokens=False)
    assert matcher.try_consume_tokens(tokens) == len(tokens)
    assert matcher.is_accepting()
