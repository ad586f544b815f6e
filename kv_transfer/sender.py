"""The sending side of transfers: K and V leave layer by layer, and a record says what left."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from core.clock import Clock
from core.errors import TransferError
from core.messages import TransferStats
from core.ticket import AttemptKey, CommitRecord, Segment, SegmentRecord, Ticket, prefix_hash
from engine.kv_storage import KVStorage
from kernels.checksum import checksum
from kv_transfer.channel import Outgoing, SendChannel
from kv_transfer.config import TransferConfig
from kv_transfer.events import Notify, TransferFailed
from kv_transfer.frame import Entry
from kv_transfer.ownership import Holdings, SendState
from kv_transfer.pairs import PairKey, Pairs

SETTLE_S = 0.05
"""How long `release` waits for the channel to book what has already arrived."""


@dataclass(slots=True)
class _Sending:
    ticket: Ticket
    channel: SendChannel
    skipped_prefix: Sequence[int]
    records: list[SegmentRecord] = field(default_factory=list)
    num_sent: int = 0
    num_bytes: int = 0
    transfer_s: float = 0.0
    committed_at: float | None = None
    last_sent_at: float = 0.0
    failed: bool = False


class KVSender:
    """All transfers that leave this worker.

    The blocks stay the prefill half's; this reads them in `push` and never later: what is on its way is a copy, owned
    by the channel. `begin`, `push` and `commit` belong to the engine thread; `cancel` may come from any thread and
    takes effect at the next layer. Failures of a transfer are told by TransferFailed, once, never raised into a step.
    """

    def __init__(self, pairs: Pairs, storage: KVStorage, config: TransferConfig, clock: Clock, notify: Notify) -> None:
        self._pairs, self._storage, self._config, self._clock, self._notify = pairs, storage, config, clock, notify
        self._changed = threading.Condition()
        self._sending: dict[AttemptKey, _Sending] = {}
        self._holdings: Holdings[SendState] = Holdings(
            lease_s=config.lease_s,
            progress_timeout_s=config.progress_timeout_s,
            queue_timeout_s=config.queue_timeout_s,
        )

    def begin(self, ticket: Ticket, skipped_prefix: Sequence[int] = ()) -> None:
        """Open a transfer; the positions of `skipped_prefix` are there already and won't be sent.

        Raises TransferError: `pair_down`, `stale_attempt`.
        """
        channel = self._pairs.sending(ticket)
        with self._changed:
            self._holdings.open(ticket, SendState.QUEUED, self._clock())
            self._sending[ticket.key] = _Sending(ticket, channel, skipped_prefix)

    def push(self, key: AttemptKey, layer: int, start: int, end: int, block_ids: Sequence[int]) -> None:
        """Copy K and V of positions [start, end) out of the cache and queue them. Waits while staging is full."""
        with self._changed:
            sending = self._sending.get(key)
            if sending is None or sending.failed:
                return
            if self._holdings[key].state is SendState.QUEUED:
                self._holdings.advance(key, SendState.PREFILLING, self._clock())
        start = max(start, len(sending.skipped_prefix))
        if start >= end:
            return
        payload = self._storage.read(layer, block_ids, start, end)
        ready = torch.cuda.current_stream().record_event() if payload.is_cuda else None
        data = payload.flatten().view(torch.uint8)
        segment = Segment(layer, 0, self._storage.layout.num_kv_heads, start, end)
        record = SegmentRecord(segment, data.numel(), checksum(data))
        with self._changed:
            if self._sending.get(key) is not sending:
                return  # cancelled while it was copied
            sending.records.append(record)
        if not sending.channel.put(Outgoing(Entry(key, record), data, ready), self._config.progress_timeout_s):
            self._fail(sending, "pair_down", "the channel took no more segments")

    def commit(self, key: AttemptKey, token_ids: Sequence[int]) -> CommitRecord:
        """The prompt `token_ids` is computed: what was sent of it, or will have been. TransferError where it failed."""
        with self._changed:
            sending = self._sending.get(key)
            if sending is None or sending.failed:
                raise TransferError("pair_down", "the transfer is over")
            now = self._clock()
            self._holdings.advance(key, SendState.COMMITTED, now)
            sending.committed_at = now
            skipped = sending.skipped_prefix
            return CommitRecord(tuple(sending.records), len(token_ids), len(skipped), prefix_hash(skipped))

    def cancel(self, key: AttemptKey) -> None:
        """Send nothing more; what is queued is dropped, the channel goes on for others. Idempotent, thread-safe."""
        with self._changed:
            sending = self._sending.pop(key, None)
            if sending is not None:
                self._holdings.advance(key, SendState.DRAINING, self._clock())
                self._holdings.close(key)
        if sending is not None:
            sending.channel.drop(key)

    def release(self, key: AttemptKey) -> TransferStats | None:
        """End a transfer, whatever its state; what it cost, where all of it had left. Idempotent."""
        with self._changed:
            sending = self._sending.get(key)
            if sending is None:
                return None
            done = sending.committed_at is not None and self._changed.wait_for(
                lambda: sending.failed or sending.num_sent == len(sending.records), SETTLE_S
            )
        self.cancel(key)
        if not done or sending.failed or sending.committed_at is None:
            return None
        exposed_s = max(0.0, sending.last_sent_at - sending.committed_at)
        return TransferStats(sending.num_bytes, sending.transfer_s, min(exposed_s, sending.transfer_s))

    def renew(self, transfer_ids: Iterable[str], now: float) -> None:
        with self._changed:
            self._holdings.renew(transfer_ids, now)

    def expired(self, now: float) -> list[tuple[AttemptKey, str]]:
        with self._changed:
            return self._holdings.expired(now)

    def on_sent(self, key: AttemptKey, num_bytes: int, seconds: float, at: float) -> None:
        with self._changed:
            sending = self._sending.get(key)
            if sending is None:
                return
            sending.num_sent += 1
            sending.num_bytes += num_bytes
            sending.transfer_s += seconds
            sending.last_sent_at = at
            self._holdings.progressed(key, at)
            self._changed.notify_all()

    def on_pair_down(self, pair: PairKey, epoch: int, reason: str) -> None:
        with self._changed:
            lost = [
                sending
                for sending in self._sending.values()
                if (sending.ticket.prefill_incarnation, sending.ticket.decode_incarnation) == pair
                and sending.ticket.pair_epoch == epoch
                and not (sending.committed_at is not None and sending.num_sent == len(sending.records))
            ]
        for sending in lost:
            self._fail(sending, "pair_down", reason)

    def _fail(self, sending: _Sending, reason: str, message: str) -> None:
        with self._changed:
            if sending.failed or self._sending.get(sending.ticket.key) is not sending:
                return
            sending.failed = True
            self._changed.notify_all()
        self._notify(TransferFailed(sending.ticket.key, reason, message))
