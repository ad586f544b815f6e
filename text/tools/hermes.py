"""Calls between `<tool_call>` tags, as Hermes and Qwen write them."""

from __future__ import annotations

from text.tools.calls import Piece
from text.tools.json_call import JsonCall

BEGIN, END = "<tool_call>", "</tool_call>"


class HermesParser:
    """Any text, and in it any number of `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

    White space around calls is dropped. A call without its closing tag counts; what stands there and is none is text.
    """

    def __init__(self) -> None:
        self._held = ""
        self._call: JsonCall | None = None
        self._closing = False  # a call has ended, its tag may come
        self._num_calls = 0

    def push(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while self._held and self._advance(pieces):
            pass
        return pieces

    def flush(self) -> list[Piece]:
        call, held = self._call, self._held
        self._call, self._held = None, ""
        if call is not None:
            return [] if call.begun else [BEGIN + call.raw + held]
        return [held] if held.strip() or (held and not self._num_calls) else []

    def _advance(self, pieces: list[Piece]) -> bool:
        """Take from what is held; False where more must come first."""
        if self._call is not None:
            return self._read_call(self._call, pieces)
        if self._closing:
            return self._read_closing()
        before, tag, after = self._held.partition(BEGIN)
        if tag:
            if before.strip():
                pieces.append(before.rstrip())
            self._held, self._call = after, JsonCall(self._num_calls)
            return True
        shown = before[: len(before) - num_begun(before, BEGIN)].rstrip()
        if shown:
            pieces.append(shown)
            self._held = before[len(shown) :]
        return False

    def _read_call(self, call: JsonCall, pieces: list[Piece]) -> bool:
        told, num_read = call.push(self._held)
        pieces += told
        self._held = self._held[num_read:]
        if not (call.ended or call.broken):
            return False
        self._call = None
        if call.begun:
            self._num_calls += 1
            self._closing = True
        else:
            pieces.append(BEGIN + call.raw)
        return True

    def _read_closing(self) -> bool:
        text = self._held.lstrip()
        if text.startswith(END):
            self._held, self._closing = text.removeprefix(END), False
            return True
        if END.startswith(text):
            return False
        self._closing = False
        return True


def num_begun(text: str, tag: str) -> int:
    """Characters at the end of `text` that may be the beginning of `tag`."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:n])), 0)
