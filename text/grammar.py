"""What a client wants its output to be, as a grammar that the engine's masks come from. The format is llguidance's."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llguidance import LLMatcher, LLTokenizer, grammar_from

from core.errors import InvalidRequestError
from text.tokenizer import Tokenizer

MAX_CHARACTERS = 2**18
"""Of what a client writes."""
MAX_KEPT = 128
"""Grammars that are remembered as sound."""
_SPACES = r"[ \n\t]{0,20}"
"""Between the parts of JSON: with no limit, a model may write them for ever."""


@dataclass(frozen=True, slots=True)
class Structure:
    """`text` is a JSON schema, a regular expression, a JSON array of strings, or a grammar (Lark or GBNF)."""

    kind: Literal["json_schema", "regex", "choice", "grammar"]
    text: str
    field: str
    """What the client calls it, for errors."""


JSON_OBJECT = '{"type": "object"}'


class GrammarCompiler:
    """Checks structures for one model. Safe to call from one thread at a time."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._text_tokenizer, self._vocab_size, self._eos_token_ids = tokenizer, vocab_size, eos_token_ids
        self._tokenizer: LLTokenizer | None = None
        self._sound: OrderedDict[Structure, str] = OrderedDict()

    def compile(self, structure: Structure) -> str:
        """The grammar; `InvalidRequestError` where the structure is malformed, or nothing fits it."""
        if structure in self._sound:
            self._sound.move_to_end(structure)
            return self._sound[structure]
        if len(structure.text) > MAX_CHARACTERS:
            size = f"{len(structure.text)} characters"
            raise InvalidRequestError(structure.field, size, f"must have at most {MAX_CHARACTERS}")
        if not self._eos_token_ids:
            fix = "can't be served: this model names no end-of-sequence token"
            raise InvalidRequestError(structure.field, structure.text, fix)
        try:
            grammar = _grammar(structure)
        except ValueError as error:
            raise InvalidRequestError(structure.field, structure.text, f"must be valid: {error}") from None
        if problem := self._problem(grammar):
            raise InvalidRequestError(structure.field, structure.text, f"must be a usable {structure.kind}: {problem}")
        self._sound[structure] = grammar
        if len(self._sound) > MAX_KEPT:
            self._sound.popitem(last=False)
        return grammar

    def _problem(self, grammar: str) -> str:
        """Why nothing could be drawn by this grammar; empty where something can."""
        try:
            self._tokenizer = self._tokenizer or LLTokenizer(
                self._text_tokenizer.to_json(), n_vocab=self._vocab_size, eos_token=list(self._eos_token_ids)
            )
        except (RuntimeError, ValueError) as error:
            return f"this model's tokenizer can't serve one: {error}"
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)  # lets other threads run meanwhile
        if matcher.is_error():
            return " ".join(matcher.get_error().split())
        return "" if any(matcher.compute_bitmask()) else "no text fits it"


def _grammar(structure: Structure) -> str:
    match structure.kind:
        case "json_schema":
            schema = json.loads(structure.text)
            if not isinstance(schema, dict):
                raise ValueError("a JSON schema is an object")
            options = {"whitespace_flexible": False, "whitespace_pattern": _SPACES}
            return LLMatcher.grammar_from_json_schema(schema, overrides=options)  # type: ignore[arg-type]
        case "choice":
            texts = json.loads(structure.text)
            if not texts or not all(isinstance(text, str) and text for text in texts):
                raise ValueError("there must be at least one text, and none may be empty")
            return grammar_from("choice", structure.text)
        case kind:
            if not structure.text:
                raise ValueError("it must not be empty")
            return grammar_from(kind, structure.text)
