"""Calls as Llama 3 writes them: an answer that is, from its start, JSON objects, or a list of calls in Python."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Collection
from typing import Any

from text.tools.calls import CallArguments, CallBegun, Piece
from text.tools.json_call import JsonCall

PYTHON_TAG = "<|python_tag|>"
_FIRST = re.compile(r"\s*(<\|python_tag\|>)?\s*\[\s*(?P<name>[A-Za-z_][\w.-]*)\s*\(")
_NEXT = re.compile(r"\s*,\s*(?P<name>[A-Za-z_][\w.-]*)\s*\(")
_MAX_OPENING = 128
"""Characters before the arguments of a call."""


class LlamaJsonParser:
    """`{"name": ..., "parameters": {...}}`, several with `;` between them, perhaps behind `<|python_tag|>`.

    An answer that begins otherwise, or with an object that calls none of `names`, is text to its end.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held = ""
        self._call: JsonCall | None = None
        self._num_calls = 0
        self._is_text = False

    def push(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while self._held and self._advance(pieces):
            pass
        return pieces

    def flush(self) -> list[Piece]:
        call, held = self._call, self._held
        self._call, self._held = None, ""
        if call is not None and not call.begun:
            held = call.raw + held
        return [held] if held.strip("\n ;") or (held and not self._num_calls) else []

    def _advance(self, pieces: list[Piece]) -> bool:
        if self._is_text:
            pieces.append(self._held)
            self._held = ""
            return False
        if self._call is None:
            return self._find_call()
        call = self._call
        told, num_read = call.push(self._held)
        pieces += told
        self._held = self._held[num_read:]
        if not (call.ended or call.broken):
            return False
        self._call = None
        if call.begun:
            self._num_calls += 1
        else:
            self._held = call.raw + self._held
        self._is_text = call.broken
        return True

    def _find_call(self) -> bool:
        text = self._held.lstrip(" \n;" if self._num_calls else " \n")
        if text.startswith(PYTHON_TAG):
            text = text.removeprefix(PYTHON_TAG).lstrip()
        elif text and PYTHON_TAG.startswith(text):
            return False
        if not text:
            return False
        if text.startswith("{"):
            self._held, self._call = text, JsonCall(self._num_calls, self._names)
        else:
            self._is_text = True
        return True


class PythonicParser:
    """`[f(x=1), g(y="a")]`: each call is told when it is complete, its arguments as JSON.

    An answer that does not begin so, with one of `names`, is text; so is what follows the list.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held = ""
        self._num_calls = 0
        self._is_text = False

    def push(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while self._held and self._advance(pieces):
            pass
        return pieces

    def flush(self) -> list[Piece]:
        held, self._held = self._held, ""
        return [held] if held.strip("\n ]") or (held and not self._num_calls) else []

    def _advance(self, pieces: list[Piece]) -> bool:
        if self._is_text:
            pieces.append(self._held)
            self._held = ""
            return False
        match = (_NEXT if self._num_calls else _FIRST).match(self._held)
        if match is None:
            return False if self._may_begin() else self._give_up()
        end = _end_of_call(self._held, match.end())
        if match["name"] in self._names and end is None:
            return False
        arguments = _arguments(self._held[match.start("name") : end]) if match["name"] in self._names else None
        if end is None or arguments is None:
            return self._give_up()
        pieces += [CallBegun(self._num_calls, match["name"]), CallArguments(self._num_calls, arguments)]
        self._num_calls += 1
        self._held = self._held[end:]
        return True

    def _may_begin(self) -> bool:
        """Whether what is held may become the beginning of a call."""
        text = self._held.lstrip()
        if self._num_calls:
            return text.strip() in ("", "]") or (text[0] == "," and len(text) < _MAX_OPENING and "(" not in text)
        if text.startswith(PYTHON_TAG):
            text = text.removeprefix(PYTHON_TAG).lstrip()
        elif PYTHON_TAG.startswith(text):
            return True
        return not text or (text[0] == "[" and len(text) < _MAX_OPENING and "(" not in text)

    def _give_up(self) -> bool:
        """The rest is text, but for the bracket that ends the list."""
        if self._num_calls:
            self._held = self._held.lstrip().removeprefix("]").lstrip()
        self._is_text = True
        return bool(self._held)


def _end_of_call(text: str, start: int) -> int | None:
    """The position behind the parenthesis that closes the one before `start`; None where it has not come."""
    depth, quote, i = 1, "", start
    while i < len(text):
        character = text[i]
        if quote:
            if character == "\\":
                i += 1
            elif character == quote:
                quote = ""
        elif character in "\"'":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
            if not depth:
                return i + 1
        i += 1
    return None


def _arguments(call: str) -> str | None:
    """The JSON of a call's keyword arguments; None where it has others, or any that are no plain values."""
    try:
        tree: Any = ast.parse(call, mode="eval").body
        if not isinstance(tree, ast.Call) or tree.args or any(keyword.arg is None for keyword in tree.keywords):
            return None
        values = {keyword.arg: _value(keyword.value) for keyword in tree.keywords}
        return json.dumps(values, ensure_ascii=False, allow_nan=False)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Any:
    """A literal; JSON's own words for true, false and null count too."""
    match node:
        case ast.Name(id="true" | "false" | "null" as word):
            return json.loads(word)
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {ast.literal_eval(k): _value(v) for k, v in zip(keys, values, strict=True) if k is not None}
        case _:
            return ast.literal_eval(node)
