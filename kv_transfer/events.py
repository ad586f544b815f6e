"""What the threads of the KV plane tell a worker. PairUp and PairDown (core.messages) are told the same way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from core.messages import PairDown, PairUp
from core.ticket import AttemptKey


@dataclass(frozen=True, slots=True)
class TransferReady:
    """Everything has come and equals the commit record. `commit_wait_s`: from `accept` to that moment."""

    key: AttemptKey
    commit_wait_s: float


@dataclass(frozen=True, slots=True)
class TransferFailed:
    """The transfer failed closed; its worker must drop it. `reason` is machine-readable."""

    key: AttemptKey
    reason: str
    message: str


KVEvent = PairUp | PairDown | TransferReady | TransferFailed
Notify = Callable[[KVEvent], None]
"""Called from threads of the KV plane, some of which hold its locks: must not block, nor call the plane."""
