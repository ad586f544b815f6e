"""The receiving side of transfers: nothing is decoded that does not equal what was sent."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from core.clock import Clock
from core.ticket import AttemptKey, CommitRecord, Segment, SegmentRecord, Ticket, prefix_hash
from engine.kv_storage import KVStorage
from kernels.checksum import checksum
from kv_transfer.config import TransferConfig
from kv_transfer.events import KVEvent, Notify, TransferFailed, TransferReady
from kv_transfer.frame import Entry
from kv_transfer.ownership import Holdings, ReceiveState
from kv_transfer.pairs import PairKey, Pairs


@dataclass(slots=True)
class _Receiving:
    """`failed`: told so, waits to be released; until then its segments are discarded."""

    ticket: Ticket
    block_ids: Sequence[int]
    num_tokens: int
    skipped_prefix: Sequence[int]
    received: dict[Segment, SegmentRecord] = field(default_factory=dict)
    record: CommitRecord | None = None
    accepted_at: float = 0.0
    done: bool = False
    failed: bool = False


class KVReceiver:
    """All transfers that come to this worker. Thread-safe.

    Channel threads write into the blocks of a live transfer, under the lock. `release` takes the lock: once it has
    returned, nobody writes into them any more, and what still comes is discarded.
    """

    def __init__(self, pairs: Pairs, storage: KVStorage, config: TransferConfig, clock: Clock, notify: Notify) -> None:
        self._pairs, self._storage, self._clock, self._notify = pairs, storage, clock, notify
        self._lock = threading.Lock()
        self._receiving: dict[AttemptKey, _Receiving] = {}
        self._num_discarded = 0
        self._holdings: Holdings[ReceiveState] = Holdings(
            lease_s=config.lease_s,
            progress_timeout_s=config.progress_timeout_s,
            queue_timeout_s=config.queue_timeout_s,
        )

    @property
    def num_discarded_segments(self) -> int:
        """Segments that came for no live transfer."""
        return self._num_discarded

    def begin(
        self, ticket: Ticket, block_ids: Sequence[int], num_tokens: int, skipped_prefix: Sequence[int] = ()
    ) -> None:
        """Open a transfer into `block_ids`, whose positions of `skipped_prefix` are filled already.

        Raises TransferError: `pair_down`, `stale_attempt`.
        """
        self._pairs.check_receiving(ticket)
        with self._lock:
            self._holdings.open(ticket, ReceiveState.RESERVED, self._clock())
            self._receiving[ticket.key] = _Receiving(ticket, block_ids, num_tokens, skipped_prefix)

    def begin_local(self, ticket: Ticket) -> None:
        """Hold a lease for an attempt that needs no transfer. Raises TransferError `stale_attempt`."""
        with self._lock:
            self._holdings.open(ticket, ReceiveState.RUNNING, self._clock())

    def accept(self, key: AttemptKey, record: CommitRecord, deadline_s: float) -> None:
        """What the other side says it sent; TransferReady or TransferFailed tells the outcome."""
        with self._lock:
            receiving = self._receiving.get(key)
            if receiving is None or receiving.failed or receiving.record is not None:
                return
            now = self._clock()
            receiving.record, receiving.accepted_at = record, now
            self._holdings.advance(key, ReceiveState.ACCEPTED, now)
            self._holdings.limit(key, now + deadline_s)
            outcome = self._check_record(receiving, record) or self._compare(receiving)
        if outcome is not None:
            self._notify(outcome)

    def on_segment(self, entry: Entry, payload: Tensor) -> None:
        """Called by a channel's thread; `payload` is the channel's, [N] uint8."""
        arrived = checksum(payload)  # of what came, whatever was announced
        with self._lock:
            receiving = self._receiving.get(entry.key)
            if receiving is None or receiving.failed or receiving.done:
                self._num_discarded += 1
                return
            outcome = self._take(receiving, entry.record, payload, arrived)
        if outcome is not None:
            self._notify(outcome)

    def release(self, key: AttemptKey) -> None:
        """The blocks are the caller's again, whatever the state. Idempotent."""
        with self._lock:
            self._receiving.pop(key, None)
            self._holdings.close(key)

    def renew(self, transfer_ids: Iterable[str], now: float) -> None:
        with self._lock:
            self._holdings.renew(transfer_ids, now)

    def expired(self, now: float) -> list[tuple[AttemptKey, str]]:
        with self._lock:
            return self._holdings.expired(now)

    def on_pair_down(self, pair: PairKey, epoch: int, reason: str) -> None:
        with self._lock:
            failed: list[KVEvent] = [
                self._fail(receiving, "pair_down", reason)
                for receiving in self._receiving.values()
                if (receiving.ticket.prefill_incarnation, receiving.ticket.decode_incarnation) == pair
                and receiving.ticket.pair_epoch == epoch
                and not (receiving.done or receiving.failed)
            ]
        for event in failed:
            self._notify(event)

    def _take(
        self, receiving: _Receiving, record: SegmentRecord, payload: Tensor, arrived: int
    ) -> TransferReady | TransferFailed | None:
        segment, layout = record.segment, self._storage.layout
        if arrived != record.checksum:
            return self._fail(receiving, "checksum_mismatch", f"{segment} arrived damaged")
        whole = segment.kv_head_start == 0 and segment.kv_head_end == layout.num_kv_heads
        in_place = len(receiving.skipped_prefix) <= segment.token_start < segment.token_end <= receiving.num_tokens
        num_bytes = segment.num_tokens * layout.bytes_per_token_per_layer
        if not (whole and in_place and segment.layer < layout.num_layers and payload.numel() == num_bytes):
            return self._fail(receiving, "unexpected_segment", f"{segment} of {payload.numel()} bytes does not fit")
        if segment in receiving.received:
            return self._fail(receiving, "duplicate_segment", f"{segment} came twice")
        shape = (2, segment.num_tokens, layout.num_kv_heads, layout.head_size)
        values = payload.view(getattr(torch, layout.dtype)).view(shape)
        self._storage.write(segment.layer, receiving.block_ids, segment.token_start, segment.token_end, values)
        if payload.is_cuda:
            torch.cuda.current_stream().synchronize()  # staging is used again, and decode reads on another stream
        receiving.received[segment] = record
        self._holdings.progressed(receiving.ticket.key, self._clock())
        if receiving.record is None:
            return None
        return self._compare(receiving)

    def _check_record(self, receiving: _Receiving, record: CommitRecord) -> TransferFailed | None:
        layout, skipped = self._storage.layout, receiving.skipped_prefix
        if record.num_tokens != receiving.num_tokens or record.num_skipped_tokens != len(skipped):
            text = f"the record covers [{record.num_skipped_tokens}, {record.num_tokens}) of {receiving.num_tokens}"
            return self._fail(receiving, "record_mismatch", text)
        if record.skipped_prefix_hash != prefix_hash(skipped):
            return self._fail(receiving, "record_mismatch", "the skipped prefix is not the same on both sides")
        if gap := record.gap(layout.num_layers, layout.num_kv_heads):
            return self._fail(receiving, "record_mismatch", gap)
        return None

    def _compare(self, receiving: _Receiving) -> TransferReady | TransferFailed | None:
        """None while segments are missing."""
        assert receiving.record is not None
        for record in receiving.record.segments:
            if (received := receiving.received.get(record.segment)) is None:
                return None
            if received != record:
                return self._fail(receiving, "record_mismatch", f"{record.segment} is not what was sent")
        if len(receiving.received) != len(receiving.record.segments):
            return self._fail(receiving, "record_mismatch", "more came than was sent")
        receiving.done = True
        key, now = receiving.ticket.key, self._clock()
        self._holdings.advance(key, ReceiveState.RUNNING, now)
        return TransferReady(key, now - receiving.accepted_at)

    def _fail(self, receiving: _Receiving, reason: str, message: str) -> TransferFailed:
        receiving.failed = True
        return TransferFailed(receiving.ticket.key, reason, message)
