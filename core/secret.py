"""A shared secret, and what can be proved and derived by it: HMAC-SHA-256 throughout."""

from __future__ import annotations

import hashlib
import hmac
import secrets

NONCE_BYTES = 16
MIN_SECRET_LEN = 16

Part = str | bytes | int | bool


class Secret:
    """Its value never shows: neither in `repr` nor in an error."""

    def __init__(self, value: bytes) -> None:
        self._value = value

    def __repr__(self) -> str:
        return "Secret(...)"

    def prove(self, purpose: str, *parts: Part) -> bytes:
        """32 bytes that only who has the secret can tell. A proof for one purpose is none for another."""
        message = b"".join(len(data).to_bytes(4, "little") + data for data in map(_bytes, (purpose, *parts)))
        return hmac.digest(self._value, message, hashlib.sha256)

    def accepts(self, proof: bytes, purpose: str, *parts: Part) -> bool:
        """In a time that tells nothing."""
        return hmac.compare_digest(proof, self.prove(purpose, *parts))

    def derive(self, purpose: str, *parts: Part) -> Secret:
        """A secret of its own: who learns it learns nothing of this one."""
        return Secret(self.prove(f"derive {purpose}", *parts))


def draw_nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


def _bytes(part: Part) -> bytes:
    return part if isinstance(part, bytes) else str(part).encode()
