"""What each token adds to the text, in bytes: text can then be decoded as it comes, whatever cuts the tokens make."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from core.errors import CheckpointError, shorten


class Pieces:
    """`pieces[token_id]` is the UTF-8 of a token, or part of a character's. Special tokens and unused ids add nothing.

    `leading_space`: the first piece of a whole text starts with a space that is not part of it (SentencePiece).
    """

    def __init__(
        self,
        token_of: Callable[[int], str | None],
        decoder: Mapping[str, Any] | None,
        special_token_ids: Collection[int],
    ) -> None:
        self._token_of = token_of
        self._to_bytes, self.leading_space = _reader_of(decoder)
        self._known: dict[int, bytes] = dict.fromkeys(special_token_ids, b"")

    def __getitem__(self, token_id: int) -> bytes:
        piece = self._known.get(token_id)
        if piece is None:
            token = self._token_of(token_id)
            piece = self._known[token_id] = b"" if token is None else self._to_bytes(token)
        return piece


def _reader_of(decoder: Mapping[str, Any] | None) -> tuple[Callable[[str], bytes], bool]:
    """How tokens become bytes, and `leading_space`, from the `decoder` of a tokenizer.json."""
    steps: Sequence[Mapping[str, Any]] = decoder.get("decoders", [decoder]) if decoder else []
    kinds = [step["type"] for step in steps]
    if kinds and set(kinds) <= {"ByteLevel", "Fuse"}:
        return _byte_level, False
    spaces: list[str] = []
    leading_space = False
    for step in steps:
        match step:
            case {"type": "Metaspace", "replacement": str(mark)}:
                spaces.append(mark)
                leading_space = step.get("prepend_scheme", "always") != "never"
            case {"type": "Replace", "pattern": {"String": str(mark)}, "content": " "}:
                spaces.append(mark)
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
                leading_space = True
            case {"type": "ByteFallback" | "Fuse"}:
                pass
            case _:
                raise _unsupported(decoder)
    if not spaces:
        raise _unsupported(decoder)
    return _SentencePiece(tuple(spaces), byte_fallback="ByteFallback" in kinds), leading_space


def _unsupported(decoder: object) -> CheckpointError:
    return CheckpointError(
        f"tokenizer.json: decoder is {shorten(decoder)}, must be ByteLevel or that of a SentencePiece model"
    )


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE (Radford et al. 2019) writes bytes as.

    Printable bytes stand for themselves; the others are numbered upwards from U+0100.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(0x100)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    """An added token may hold characters outside of the alphabet: it is its own text."""
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()


class _SentencePiece:
    """`marks` are written for spaces; with `byte_fallback`, `<0xE2>` is one byte of a character without a token."""

    def __init__(self, marks: tuple[str, ...], *, byte_fallback: bool) -> None:
        self._marks = marks
        self._byte_fallback = byte_fallback

    def __call__(self, token: str) -> bytes:
        if self._byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass
        for mark in self._marks:
            token = token.replace(mark, " ")
        return token.encode()
