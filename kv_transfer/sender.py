"""The sending side of transfers: K and V leave layer by layer, and a record says what left."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from core.clock import Clock
from core.errors import TransferError
from core.messages import TransferStats
from core.ticket import AttemptKey, CommitRecord, Segment, SegmentRecord, Ticket, prefix_hash
from engine.kv_storage import KVStorage
from kernels.checksum import checksum
from kv_transfer.channel import SendChannel
from kv_transfer.config import TransferConfig
from kv_transfer.events import Notify, TransferFailed
from kv_transfer.frame import MAX_PAYLOAD_BYTES, Entry, check_transfer_id
from kv_transfer.outbox import Outgoing
from kv_transfer.ownership import Holding, Ledger, SendState
from kv_transfer.pairs import PairKey, Pairs
from kv_transfer.reshard import ReshardPlan
from kv_transfer.streaming import batch_bytes
from kv_transfer.wire import to_wire

SETTLE_S = 0.05
"""How long `release` waits for the channel to book what has already arrived."""


@dataclass(frozen=True, slots=True)
class _Due:
    """K and V of positions [start, end) of a layer, which stand in the cache and have not left."""

    layer: int
    start: int
    end: int
    block_ids: Sequence[int]


@dataclass(slots=True, eq=False)
class _Sending:
    holding: Holding[SendState]
    channel: SendChannel
    skipped_prefix: Sequence[int]
    due: list[_Due] = field(default_factory=list)
    """What gathers, to leave together."""
    records: list[SegmentRecord] = field(default_factory=list)
    num_sent: int = 0
    num_bytes: int = 0
    transfer_s: float = 0.0
    committed_at: float | None = None
    last_sent_at: float = 0.0
    failure: TransferError | None = None

    @property
    def key(self) -> AttemptKey:
        return self.holding.ticket.key

    @property
    def all_sent(self) -> bool:
        return self.committed_at is not None and self.num_sent == len(self.records)


class KVSender:
    """All transfers that leave this worker.

    The blocks stay the prefill half's; this reads them in `push` and `flush` and never later: what is on its way is a
    copy, owned by the channel. The `push` of a step's last layer leaves nothing to be read. `begin`, `push`, `flush`,
    `commit` and `release` belong to the engine thread; the rest may come from any. Failures of a transfer are told by
    TransferFailed, once, and never raised into a step.
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
        self._config = config
        self._changed = threading.Condition()
        self._sending: dict[AttemptKey, _Sending] = {}
        self._ledger: Ledger[SendState] = Ledger(config)
        self._max_bytes = min(MAX_PAYLOAD_BYTES, config.coalesce_bytes, config.max_staging_bytes)
        self._max_cells = max(self._max_bytes // storage.layout.bytes_per_cell, storage.layout.num_kv_heads)

    def begin(self, ticket: Ticket, skipped_prefix: Sequence[int] = ()) -> None:
        """Open a transfer; the positions of `skipped_prefix` are there already and won't be sent.

        Raises TransferError: `pair_down`, `stale_attempt`, `invalid_ticket`.
        """
        check_transfer_id(ticket.transfer_id)
        channel = self._pairs.sending(ticket)
        with self._changed:
            opened = self._ledger.open(ticket, SendState.QUEUED, self._clock())
            fenced = self._sending.pop(opened.fenced.ticket.key, None) if opened.fenced is not None else None
            self._sending[ticket.key] = _Sending(opened.holding, channel, skipped_prefix)
        if fenced is not None:
            fenced.channel.drop(fenced.key)
            self._notify(TransferFailed(fenced.key, "stale_attempt", f"attempt {ticket.attempt} has begun"))

    def push(self, key: AttemptKey, layer: int, start: int, end: int, block_ids: Sequence[int]) -> None:
        """K and V of positions [start, end) stand in the cache: they leave, now or together with layers to come.

        Waits while staging is full and the peer takes some of it; a peer that takes nothing fails the transfer after
        one `keepalive_s`, for other pairs wait meanwhile. Does nothing for one that has failed, was cancelled or is
        unknown.
        """
        sending = self._live(key)
        if sending is None:
            return
        layout = self._storage.layout
        sending.due.append(_Due(layer, max(start, len(sending.skipped_prefix)), end, block_ids))
        num_tokens = [max(0, due.end - due.start) for due in sending.due]
        token_bytes = layout.on_wire(sending.holding.ticket.kv_wire_dtype).bytes_per_token_per_layer
        total_bytes = num_tokens[-1] * token_bytes * layout.num_layers
        enough = batch_bytes(total_bytes, sending.channel.fit, self._config.streaming)
        if layer == layout.num_layers - 1 or sum(num_tokens) * token_bytes >= enough:
            self._flush(sending)

    def flush(self, key: AttemptKey) -> None:
        """Let what has gathered leave; for the engine thread."""
        if (sending := self._live(key)) is not None:
            self._flush(sending)

    def commit(self, key: AttemptKey, token_ids: Sequence[int]) -> CommitRecord:
        """The prompt `token_ids` is computed: what was sent of it, or will have been.

        Raises the TransferError it failed by, or `cancelled`.
        """
        self.flush(key)
        sending = self._live(key)
        with self._changed:
            if sending is None or not sending.holding.live:
                sending = self._sending.get(key)
                raise (sending and sending.failure) or TransferError("cancelled", "the transfer was cancelled")
            sending.committed_at = self._clock()
            sending.holding.advance(SendState.COMMITTED, sending.committed_at)
            skipped = sending.skipped_prefix
            return CommitRecord(tuple(sending.records), len(token_ids), len(skipped), prefix_hash(skipped))

    def cancel(self, key: AttemptKey) -> None:
        """Send nothing more; what is queued is dropped, the channel goes on for others. Idempotent, thread-safe."""
        with self._changed:
            if (sending := self._sending.get(key)) is None:
                return
            sending.holding.drain(self._clock())
            self._changed.notify_all()
        sending.channel.drop(key)

    def release(self, key: AttemptKey) -> TransferStats | None:
        """End a transfer, whatever its state; what it cost, where all of it had left. Idempotent."""
        with self._changed:
            if (sending := self._sending.get(key)) is None:
                return None
            if sending.committed_at is not None:  # a segment may be with the peer before its sender has noticed
                self._changed.wait_for(lambda: sending.all_sent or not sending.holding.live, SETTLE_S)
            stats = _stats(sending) if sending.all_sent and sending.holding.live else None
        self.cancel(key)
        with self._changed:
            self._sending.pop(key, None)
            self._ledger.close(key)
        return stats

    def renew(self, transfer_ids: Iterable[str], now: float) -> None:
        with self._changed:
            self._ledger.renew(transfer_ids, now)

    def expired(self, now: float) -> list[tuple[AttemptKey, str]]:
        """Transfers that have run out of time: they are cancelled, and told again if not released within a lease."""
        with self._changed:
            ended = [(holding.ticket.key, reason) for holding, reason in self._ledger.expired(now)]
        for key, _ in ended:
            self.cancel(key)
        return ended

    def on_sent(self, key: AttemptKey, num_bytes: int, seconds: float, at: float) -> None:
        """A segment has left. Called by the channel's thread."""
        with self._changed:
            if (sending := self._sending.get(key)) is None:
                return
            sending.num_sent += 1
            sending.num_bytes += num_bytes
            sending.transfer_s += seconds
            sending.last_sent_at = at
            sending.holding.progressed(at)
            self._changed.notify_all()

    def on_pair_down(self, pair: PairKey, epoch: int, reason: str) -> None:
        """Fail what the channel has not carried to the end. What has left completely waits for its release."""
        with self._changed:
            lost = [s for s in self._sending.values() if _is_of(s.holding.ticket, pair, epoch) and not s.all_sent]
        for sending in lost:
            self._fail(sending, "pair_down", reason)

    def keys(self) -> list[AttemptKey]:
        """Attempts with a transfer here, until their release."""
        with self._changed:
            return list(self._sending)

    def check_integrity(self) -> None:
        """Raises IntegrityError where holdings and transfers are not the same attempts."""
        with self._changed:
            self._ledger.check_integrity(self._sending)

    def _live(self, key: AttemptKey) -> _Sending | None:
        """The transfer, if it is in time and neither failed nor cancelled."""
        with self._changed:
            sending, now = self._sending.get(key), self._clock()
            if sending is None or not sending.holding.live:
                return None
            expired = sending.holding.expired(now)
            if expired is None and sending.holding.state is SendState.QUEUED:
                sending.holding.advance(SendState.PREFILLING, now)
        if expired is not None:
            self._fail(sending, expired, expired.replace("_", " "))
            return None
        return sending

    def _flush(self, sending: _Sending) -> None:
        """Queue all that has gathered, in pieces that are on their way while the next is copied."""
        due, sending.due = sending.due, []
        segments = [
            (segment, each.block_ids)
            for each in due
            for segment in self._plan.outgoing(0, each.layer, each.start, each.end, self._max_cells)
        ]
        num_bytes = 0
        for i, (segment, block_ids) in enumerate(segments, start=1):
            num_bytes += segment.num_cells * self._storage.layout.bytes_per_cell
            more = i < len(segments) and num_bytes < self._max_bytes
            if not self._push(sending, segment, block_ids, more=more):
                return
            if not more:
                num_bytes = 0

    def _push(self, sending: _Sending, segment: Segment, block_ids: Sequence[int], *, more: bool) -> bool:
        if (outgoing := self._copy(sending, segment, block_ids)) is not None:
            sending.records.append(outgoing.entry.record)
            if sending.channel.put(outgoing, lambda: sending.holding.live, more=more):
                return True
        if sending.channel.closed:
            self._fail(sending, "pair_down", "the channel has ended")
        else:
            self._fail(sending, "staging_full", "the channel took no more segments in time")
        return False

    def _copy(self, sending: _Sending, segment: Segment, block_ids: Sequence[int]) -> Outgoing | None:
        """A segment as it leaves; None where there was no room in time.

        On a GPU the checksum waits for the copy, so that the channel's thread may touch it from any stream.
        """
        channel, s = sending.channel, segment
        where = (s.layer, block_ids, s.token_start, s.token_end)
        heads = (s.kv_head_start, s.kv_head_end)
        layout, wire_dtype = self._storage.layout, sending.holding.ticket.kv_wire_dtype
        as_cached, block_size = layout.on_wire(wire_dtype) == layout, 0
        if self._storage.device.type != "cpu":
            payload = to_wire(self._storage.read(*where, heads), layout, wire_dtype)
            return Outgoing(Entry(sending.key, SegmentRecord(s, payload.numel(), checksum(payload))), payload)
        num_bytes = segment.num_cells * layout.on_wire(wire_dtype).bytes_per_cell
        staged = channel.stage(num_bytes, lambda: sending.holding.live)
        if staged is None:
            return None
        try:
            if as_cached:
                value = self._storage.read_into(*where, staged, heads, by_blocks=channel.by_blocks)
                block_size = layout.block_size if channel.by_blocks else 0
            else:
                value = checksum(staged.copy_(to_wire(self._storage.read(*where, heads), layout, wire_dtype)))
        except BaseException:
            channel.unstage(staged)
            raise
        return Outgoing(Entry(sending.key, SegmentRecord(s, num_bytes, value), block_size), staged, staged=True)

    def _fail(self, sending: _Sending, reason: str, message: str) -> None:
        with self._changed:
            if not sending.holding.live:
                return
            sending.holding.drain(self._clock())
            sending.failure = TransferError(reason, message)
            self._changed.notify_all()
        sending.channel.drop(sending.key)
        self._notify(TransferFailed(sending.key, reason, message))


def _is_of(ticket: Ticket, pair: PairKey, epoch: int) -> bool:
    return (ticket.prefill_incarnation, ticket.decode_incarnation) == pair and ticket.pair_epoch == epoch


def _stats(sending: _Sending) -> TransferStats:
    exposed_s = sending.last_sent_at - (sending.committed_at or 0.0)
    return TransferStats(sending.num_bytes, sending.transfer_s, max(0.0, exposed_s))
