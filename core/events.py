"""The life-cycle events of a request: one enum feeds metrics, traces, benchmarks and simulator."""

from __future__ import annotations

from enum import Enum


class LifecycleEvent(Enum):
    """In the order of an undisturbed, disaggregated request."""

    ARRIVED = "arrived"
    PLACED = "placed"  # taken from the queue, the pair chosen
    RESERVED = "reserved"
    PREFILL_SENT = "prefill_sent"
    FIRST_TOKEN = "first_token"
    RESUMED = "resumed"  # instead, where an earlier attempt had brought it
    ACCEPTED = "accepted"
    FIRST_DECODE_TOKEN = "first_decode_token"
    FINISHED = "finished"
    REFUSED = "refused"  # a worker had no room: back to the queue
    RETRIED = "retried"
    MOVED = "moved"  # another worker is to go on decoding, with the K and V that the first one has
    STAYED = "stayed"  # it had no room: the first one goes on
    CANCELLED = "cancelled"
    FAILED = "failed"
