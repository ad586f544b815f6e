"""Names of KV blocks by what they hold: equal names mean equal K and V, on every worker."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

DIGEST_BYTES = 32
"""Nobody finds two different prefixes of one name, not even who chooses the tokens."""


def root_hash(model: str, salt: str = "") -> bytes:
    """What the name of a first block starts from.

    `model` says all that K and V depend on beside the tokens. Prefixes under different salts are never taken for each
    other: a salt of its own keeps a tenant from learning, by timing, what others have asked.
    """
    named = f"{len(model)}:{model}{salt}".encode()
    return hashlib.blake2b(named, digest_size=DIGEST_BYTES, person=b"kv prefix root").digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Name of the full block that holds `token_ids`, after the block named `parent` (the first: after the root)."""
    packed = struct.pack(f"<{len(token_ids)}I", *token_ids)
    return hashlib.blake2b(parent + packed, digest_size=DIGEST_BYTES, person=b"kv block").digest()
