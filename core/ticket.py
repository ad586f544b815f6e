"""Tickets, segments and commit records: what the two sides of a KV transfer agree on."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from core.kv_layout import WireDtype

LANE_SHIFT, LANE_BITS = 40, 20
"""Where in a pair's epoch its router's lane stands: routers that share workers have channels of their own."""

AttemptKey = tuple[str, int]
"""`(transfer_id, attempt)`: what makes a command idempotent and a late message recognisable."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """Minted by the router for one attempt at one request on one pair. Equal incarnations mean: no transfer.

    `kv_wire_dtype` says how K and V travel, so that both sides need no settings of their own that could differ.
    `traceparent` is the trace context for what workers log.
    """

    request_id: str
    attempt: int
    transfer_id: str
    prefill_incarnation: str
    decode_incarnation: str
    pair_epoch: int
    kv_wire_dtype: WireDtype = "auto"
    traceparent: str = ""

    @property
    def key(self) -> AttemptKey:
        return self.transfer_id, self.attempt

    @property
    def signed_fields(self) -> tuple[str | int, ...]:
        """What a router vouches for: all of it."""
        return astuple(self)

    @property
    def local(self) -> bool:
        return self.prefill_incarnation == self.decode_incarnation


def engine_id(key: AttemptKey) -> str:
    """A scheduler's name of an attempt: attempts at one request are requests of their own to an engine."""
    transfer_id, attempt = key
    return f"{transfer_id}/{attempt}"


@dataclass(frozen=True, slots=True)
class Segment:
    """What one layer caches for a range of KV heads and of token positions.

    Its payload is as `KVStorage` reads it, or rounded (`kv_transfer.wire`).
    """

    layer: int
    kv_head_start: int
    kv_head_end: int
    token_start: int
    token_end: int
    sender_rank: int = 0
    receiver_rank: int = 0

    @property
    def num_cells(self) -> int:
        """Its (token, KV head) pairs."""
        return (self.token_end - self.token_start) * (self.kv_head_end - self.kv_head_start)


@dataclass(frozen=True, slots=True)
class SegmentRecord:
    """A segment as it left: its bytes on the wire, and the checksum of these (`kernels.checksum`)."""

    segment: Segment
    num_bytes: int
    checksum: int


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """All that the prefill side sent for one attempt. Decode joins only if what it received equals this."""

    segments: tuple[SegmentRecord, ...]
    num_tokens: int
    num_skipped_tokens: int = 0
    skipped_prefix_hash: bytes = b""

    @property
    def num_bytes(self) -> int:
        return sum(record.num_bytes for record in self.segments)


def prefix_hash(token_ids: Sequence[int]) -> bytes:
    """Identity of a prefix of tokens: 16 bytes of BLAKE2b over the token ids as little-endian uint32."""
    return hashlib.blake2b(struct.pack(f"<{len(token_ids)}I", *token_ids), digest_size=16).digest()


def lane_of(epoch: int) -> int:
    """Which router's channel a pair's epoch names. Within a lane the greater epoch is the later one."""
    return epoch >> LANE_SHIFT
