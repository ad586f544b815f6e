"""Tokens that are provably right or wrong, and the events that carry them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Any

from penstock.v1 import worker_pb2 as pb

Key = tuple[str, int]
VOCAB_SIZE = 50_000


def next_token(token_ids: Sequence[int]) -> int:
    return zlib.crc32(struct.pack(f"<{len(token_ids)}I", *token_ids)) % VOCAB_SIZE


def continuation(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What any number of workers, in any number of attempts, must make of a prompt."""
    token_ids = list(prompt)
    for _ in range(num_tokens):
        token_ids.append(next_token(token_ids))
    return token_ids[len(prompt) :]


def key_of(ticket: pb.Ticket) -> Key:
    return ticket.transfer_id, ticket.attempt


def tokens(key: Key, token_ids: Sequence[int], finish: Any = pb.ENGINE_FINISH_UNSPECIFIED) -> pb.Event:
    sequence = pb.SequenceTokens(transfer_id=key[0], attempt=key[1], token_ids=token_ids, finish=finish)
    return pb.Event(tokens=pb.StepTokens(sequences=[sequence]))


def failed(key: Key, reason: str = "internal") -> pb.Event:
    return pb.Event(failed=pb.AttemptFailed(transfer_id=key[0], attempt=key[1], reason=reason, message="as scripted"))
