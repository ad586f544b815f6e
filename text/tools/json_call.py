"""One call written as a JSON object, read character by character: `{"name": ..., "arguments": {...}}`."""

from __future__ import annotations

import json
from collections.abc import Collection
from enum import Enum, auto

from text.tools.calls import CallArguments, CallBegun, Piece

ARGUMENT_KEYS = ("arguments", "parameters")
_BLANKS = " \t\r\n"


class _At(Enum):
    OBJECT = auto()  # before {
    KEY = auto()  # before a key, a comma or }
    IN_KEY = auto()
    COLON = auto()
    VALUE = auto()  # before a value
    IN_VALUE = auto()
    END = auto()
    BROKEN = auto()


class JsonCall:
    """Tells the call as soon as it is known to be one; its arguments are passed on as the model writes them.

    With `names`, an object that names none of them is no call. What was read of an object that is no call is `raw`.
    Values inside the arguments are not checked.
    """

    def __init__(self, index: int, names: Collection[str] | None = None) -> None:
        self._index, self._names = index, names
        self._at = _At.OBJECT
        self._key = ""
        self._name: str | None = None
        self._begun = False
        self._has_arguments = False
        self._arguments = ""  # read, and not told yet
        self._value = ""
        self._depth, self._in_string, self._escaped = 0, False, False
        self.raw = ""

    @property
    def begun(self) -> bool:
        """Whether it was told."""
        return self._begun

    @property
    def ended(self) -> bool:
        return self._at is _At.END

    @property
    def broken(self) -> bool:
        """Whether it is no call, or has stopped to be JSON."""
        return self._at is _At.BROKEN

    def push(self, text: str) -> tuple[list[Piece], int]:
        """What is told, and how many characters were read: fewer than all at the end of the object, or of sense."""
        num_read = 0
        for character in text:
            if not self._step(character):
                break
            num_read += 1
            if self.ended:
                break
        if not self._begun:
            self.raw += text[:num_read]
        return self._tell(), num_read

    def _tell(self) -> list[Piece]:
        pieces: list[Piece] = []
        if not self._begun and not self.broken:
            if self._name is not None and (self._has_arguments or self.ended):
                self._begun = True
                pieces.append(CallBegun(self._index, self._name))
            elif self.ended:
                self._at = _At.BROKEN
        if self._begun:
            told, self._arguments = self._arguments, ""
            if self.ended and not self._has_arguments:
                told = "{}"
            if told:
                pieces.append(CallArguments(self._index, told))
        return pieces

    def _step(self, character: str) -> bool:
        """Read one character; False where it is not of this object."""
        match self._at:
            case _At.IN_KEY | _At.IN_VALUE:
                return self._inside(character)
            case _ if character in _BLANKS:
                return True
            case _At.OBJECT if character == "{":
                self._at = _At.KEY
            case _At.KEY if character == '"':
                self._at, self._value, self._escaped = _At.IN_KEY, character, False
            case _At.KEY if character == "," and self._key:
                self._key = ""
            case _At.KEY if character == "}":
                self._at = _At.END
            case _At.COLON if character == ":":
                self._at = _At.VALUE
            case _At.VALUE if character not in ",:]}":
                self._at, self._value, self._depth = _At.IN_VALUE, "", 0
                self._in_string = self._escaped = False
                return self._inside(character)
            case _:
                self._at = _At.BROKEN
        return not self.broken

    def _inside(self, character: str) -> bool:
        if self._at is _At.IN_KEY:
            self._value += character
            if self._escaped or character != '"':
                self._escaped = character == "\\" and not self._escaped
                return True
            self._key = self._text(self._value) or "?"
            self._at = _At.COLON
            return not (self._key in ARGUMENT_KEYS and self._has_arguments) or self._break()
        if not self._in_string and not self._depth and self._value and character in ",}" + _BLANKS:
            self._end_value()  # of a number or a word
            return not self.broken and self._step(character)
        self._take(character)
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._in_string = False
                if not self._depth:
                    self._end_value()
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "]}":
            self._depth -= 1
            if self._depth <= 0:
                self._end_value()
        return not self.broken

    def _take(self, character: str) -> None:
        if self._key in ARGUMENT_KEYS:
            self._arguments += character
            self._has_arguments = True
            self._value = character  # only that it is not empty counts
        else:
            self._value += character

    def _end_value(self) -> None:
        self._at = _At.KEY
        if self._key == "name":
            self._name = self._text(self._value)
            if not self._name or (self._names is not None and self._name not in self._names):
                self._break()

    def _break(self) -> bool:
        self._at = _At.BROKEN
        return False

    @staticmethod
    def _text(value: str) -> str | None:
        try:
            text = json.loads(value, strict=False)
        except ValueError:
            return None
        return text if isinstance(text, str) else None
