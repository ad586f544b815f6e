"""The receiving side of transfers: nothing is decoded that does not equal what was sent."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from core.clock import Clock
from core.errors import IntegrityError, TransferError
from core.ticket import AttemptKey, CommitRecord, Segment, SegmentRecord, Ticket, prefix_hash
from engine.kv_storage import KVStorage
from kernels.checksum import checksum
from kv_transfer.config import TransferConfig
from kv_transfer.events import Notify, TransferFailed, TransferReady
from kv_transfer.frame import Entry
from kv_transfer.ownership import Holding, Ledger, ReceiveState
from kv_transfer.pairs import PairKey, Pairs
from kv_transfer.reshard import ReshardPlan
from kv_transfer.wire import from_wire

_WAITING = (ReceiveState.RESERVED, ReceiveState.ACCEPTED)


@dataclass(slots=True, eq=False)
class _Receiving:
    holding: Holding[ReceiveState]
    block_ids: Sequence[int] = ()
    num_tokens: int = 0
    skipped_prefix: Sequence[int] = ()
    received: dict[Segment, SegmentRecord] = field(default_factory=dict)
    record: CommitRecord | None = None
    accepted_at: float = 0.0

    @property
    def key(self) -> AttemptKey:
        return self.holding.ticket.key

    @property
    def waiting(self) -> bool:
        """Segments may come: its blocks may be written."""
        return self.holding.state in _WAITING


class KVReceiver:
    """All transfers that come to this worker. Thread-safe.

    Channel threads write into the blocks of a waiting transfer, under the lock. `cancel` and `release` take the lock:
    once they have returned, nobody writes into those blocks any more, and what still comes is discarded. After
    TransferReady the blocks are decode's alone; the holding stays, for its lease, until `release`.
    """

    def __init__(
        self,
        pairs: Pairs,
        storage: KVStorage,
        plan: ReshardPlan,
        config: TransferConfig,
        clock: Clock,
        notify: Notify,
    ) -> None:
        self._pairs, self._storage, self._plan, self._clock, self._notify = pairs, storage, plan, clock, notify
        self._lock = threading.Lock()
        self._receiving: dict[AttemptKey, _Receiving] = {}
        self._ledger: Ledger[ReceiveState] = Ledger(config)
        self._num_discarded = 0

    @property
    def num_discarded_segments(self) -> int:
        """Segments that came for no waiting transfer."""
        return self._num_discarded

    def begin(
        self, ticket: Ticket, block_ids: Sequence[int], num_tokens: int, skipped_prefix: Sequence[int] = ()
    ) -> None:
        """Open a transfer into `block_ids`, whose positions of `skipped_prefix` are filled already.

        Raises TransferError: `pair_down`, `stale_attempt`; IntegrityError where the blocks are too few.
        """
        if num_tokens > len(block_ids) * self._storage.layout.block_size:
            raise IntegrityError(f"{num_tokens} tokens do not fit into {len(block_ids)} blocks")
        self._open(ticket, ReceiveState.RESERVED, tuple(block_ids), num_tokens, skipped_prefix)
        try:
            self._pairs.check_receiving(ticket)  # not before: now the end of the pair finds the transfer, or is seen
        except TransferError:
            self.release(ticket.key)
            raise

    def begin_local(self, ticket: Ticket) -> None:
        """Hold a lease for an attempt that needs no transfer. Raises TransferError `stale_attempt`."""
        self._open(ticket, ReceiveState.RUNNING, (), 0, ())

    def accept(self, key: AttemptKey, record: CommitRecord, deadline_s: float) -> None:
        """What the other side says it sent; TransferReady or TransferFailed tells the outcome. Idempotent.

        The last segment must come within `deadline_s`, or `expired` names the transfer.
        """
        with self._lock:
            receiving, now = self._receiving.get(key), self._clock()
            if receiving is None or receiving.holding.state is not ReceiveState.RESERVED:
                return
            receiving.record, receiving.accepted_at = record, now
            receiving.holding.advance(ReceiveState.ACCEPTED, now)
            receiving.holding.limit(now + deadline_s)
            outcome = self._guarded(receiving, lambda: self._check_record(receiving, record))
        if outcome is not None:
            self._notify(outcome)

    def on_segment(self, entry: Entry, payload: Tensor) -> None:
        """Called by a channel's thread; `payload` is the channel's, [N] uint8."""
        with self._lock:
            if (receiving := self._waiting(entry.key)) is None:
                self._num_discarded += 1
                return
            outcome = self._guarded(receiving, lambda: self._take(receiving, entry, payload))
        if outcome is not None:
            self._notify(outcome)

    def cancel(self, key: AttemptKey) -> None:
        """Take nothing more; what still comes is discarded. The holding stays until `release`. Idempotent."""
        with self._lock:
            if receiving := self._receiving.get(key):
                receiving.holding.drain(self._clock())

    def release(self, key: AttemptKey) -> None:
        """The blocks are the caller's again, whatever the state. Idempotent."""
        with self._lock:
            self._receiving.pop(key, None)
            self._ledger.close(key)

    def renew(self, transfer_ids: Iterable[str], now: float) -> None:
        with self._lock:
            self._ledger.renew(transfer_ids, now)

    def expired(self, now: float) -> list[tuple[AttemptKey, str]]:
        """Attempts that have run out of time: they are cancelled, and told again if not released within a lease."""
        with self._lock:
            ended = self._ledger.expired(now)
            for holding, _ in ended:
                holding.drain(now)
        return [(holding.ticket.key, reason) for holding, reason in ended]

    def on_pair_down(self, pair: PairKey, epoch: int, reason: str) -> None:
        """Fail what was still coming over the channel. What has come completely goes on."""
        with self._lock:
            lost = []
            for receiving in self._receiving.values():
                ticket = receiving.holding.ticket
                names = ticket.prefill_incarnation, ticket.decode_incarnation
                if receiving.waiting and names == pair and ticket.pair_epoch == epoch:
                    lost.append(self._fail(receiving, TransferError("pair_down", reason)))
        for event in lost:
            self._notify(event)

    def keys(self) -> list[AttemptKey]:
        """Attempts that hold something here, until their release."""
        with self._lock:
            return list(self._receiving)

    def check_integrity(self) -> None:
        """Raises IntegrityError where holdings and transfers are not the same attempts."""
        with self._lock:
            self._ledger.check_integrity(self._receiving)

    # ---- under the lock

    def _open(
        self,
        ticket: Ticket,
        state: ReceiveState,
        block_ids: Sequence[int],
        num_tokens: int,
        skipped_prefix: Sequence[int],
    ) -> None:
        with self._lock:
            opened = self._ledger.open(ticket, state, self._clock())
            fenced = self._receiving.pop(opened.fenced.ticket.key, None) if opened.fenced is not None else None
            self._receiving[ticket.key] = _Receiving(opened.holding, block_ids, num_tokens, skipped_prefix)
        if fenced is not None:
            self._notify(TransferFailed(fenced.key, "stale_attempt", f"attempt {ticket.attempt} has begun"))

    def _waiting(self, key: AttemptKey) -> _Receiving | None:
        receiving = self._receiving.get(key)
        return receiving if receiving is not None and receiving.waiting else None

    def _guarded(self, receiving: _Receiving, step: Callable[[], None]) -> TransferReady | TransferFailed | None:
        """Take a step of a transfer that is in time, then compare if all is there; its errors end the transfer."""
        now = self._clock()
        try:
            if expired := receiving.holding.expired(now):
                raise TransferError(expired, expired.replace("_", " "))
            step()
            if receiving.record is None or not _complete(receiving, receiving.record):
                return None
        except TransferError as error:
            return self._fail(receiving, error)
        receiving.holding.advance(ReceiveState.RUNNING, now)
        return TransferReady(receiving.key, now - receiving.accepted_at)

    def _take(self, receiving: _Receiving, entry: Entry, payload: Tensor) -> None:
        """Copy a segment into its place in the blocks, and verify what was copied: a damaged one ends the transfer."""
        record, segment, cache = entry.record, entry.record.segment, self._storage.layout
        wire_dtype, by_blocks = receiving.holding.ticket.kv_wire_dtype, entry.block_size != 0
        in_place = len(receiving.skipped_prefix) <= segment.token_start < segment.token_end <= receiving.num_tokens
        num_bytes = segment.num_cells * cache.on_wire(wire_dtype).bytes_per_cell
        if not (self._plan.expects(segment) and in_place and payload.numel() == num_bytes):
            raise TransferError("unexpected_segment", f"{segment} of {payload.numel()} bytes does not fit")
        if by_blocks and (entry.block_size != cache.block_size or cache.on_wire(wire_dtype) != cache):
            raise TransferError("unexpected_segment", f"{segment} comes in blocks of {entry.block_size}")
        if segment in receiving.received:
            raise TransferError("duplicate_segment", f"{segment} came twice")
        tokens, heads = (segment.token_start, segment.token_end), (segment.kv_head_start, segment.kv_head_end)
        where = (segment.layer, receiving.block_ids, *tokens)
        if cache.on_wire(wire_dtype) == cache:
            arrived = self._storage.write(*where, payload, heads, by_blocks=by_blocks)
        else:
            arrived = checksum(payload)
            if arrived == record.checksum:  # else there may be no sense in what it widens to
                self._storage.write(*where, from_wire(payload, cache, wire_dtype), heads)
        if self._storage.device.type == "cuda":  # staging is used again, and decode may read on another stream
            torch.cuda.current_stream(self._storage.device).synchronize()
        if arrived != record.checksum:
            raise TransferError("checksum_mismatch", f"{segment} arrived damaged")
        receiving.received[segment] = record
        if receiving.record is None:  # afterwards the deadline of `accept` stands
            receiving.holding.progressed(self._clock())

    def _check_record(self, receiving: _Receiving, record: CommitRecord) -> None:
        skipped = receiving.skipped_prefix
        if record.num_tokens != receiving.num_tokens or record.num_skipped_tokens != len(skipped):
            text = f"the record covers [{record.num_skipped_tokens}, {record.num_tokens}) of {receiving.num_tokens}"
            raise TransferError("record_mismatch", text)
        if record.skipped_prefix_hash != prefix_hash(skipped):
            raise TransferError("record_mismatch", "the skipped prefix is not the same on both sides")
        if gap := self._plan.gap(record):
            raise TransferError("record_mismatch", gap)

    def _fail(self, receiving: _Receiving, error: TransferError) -> TransferFailed:
        receiving.holding.drain(self._clock())
        return TransferFailed(receiving.key, error.reason, str(error))


def _complete(receiving: _Receiving, record: CommitRecord) -> bool:
    """Whether all that was sent has come; TransferError where what has come is not what was sent."""
    if len(receiving.received) < len(record.segments):
        return False
    for sent in record.segments:
        if receiving.received.get(sent.segment) != sent:
            raise TransferError("record_mismatch", f"{sent.segment} is not what was sent")
    if len(receiving.received) != len(record.segments):
        raise TransferError("record_mismatch", "more came than was sent")
    return True
