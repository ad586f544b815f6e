"""Calls of tools in what a model writes: the parts that parsers tell, as they come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. `definition` is the client's JSON for the chat template, `parameters` the
    JSON schema of its arguments."""

    name: str
    definition: str
    parameters: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """The model calls `name`. Calls of one answer are counted from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the arguments of call `index`: all of it, put together, is JSON where the model wrote any."""

    index: int
    text: str


Piece = str | CallBegun | CallArguments
"""A string is text beside the calls."""


class ToolCallParser(Protocol):
    """Reads one answer, however the text is cut. Text that turns out to be no call is given out as it is."""

    def push(self, text: str) -> list[Piece]:
        """What `text` lets out."""

    def flush(self) -> list[Piece]:
        """What was held back, once the answer is known to end here."""
