"""Token ids to text, as they come."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from text.pieces import Pieces


class Detokenizer:
    """Text of one sequence of tokens. Each token is looked at once, and a character is given out whole or not at all.

    What all calls return, put together, is the text of all tokens: bytes that are no UTF-8 become U+FFFD. (Where a
    SentencePiece model writes a run of bytes that is only partly UTF-8, the characters in it stay; decoding the whole
    run at once would lose them.) With `strip_leading_space` a first space of the text is dropped.
    """

    def __init__(self, pieces: Pieces, *, strip_leading_space: bool = False) -> None:
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = strip_leading_space

    def push(self, token_ids: Iterable[int]) -> str:
        """The characters that these tokens complete."""
        pieces = self._pieces
        return self._stripped(self._utf8.decode(b"".join([pieces[token_id] for token_id in token_ids])))

    def flush(self) -> str:
        """What is left of an unfinished character at the end of the sequence: U+FFFD, or nothing."""
        return self._stripped(self._utf8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text
