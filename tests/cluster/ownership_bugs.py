"""Bugs that such code is prone to, planted one at a time: a model is as good as those it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from torch import Tensor

from cluster.worker import SessionClosed, Worker
from core.ticket import AttemptKey, CommitRecord, Ticket, engine_id
from decode_worker.half import DecodeHalf
from kv_transfer.frame import Entry
from kv_transfer.ownership import Holding, Ledger, Opened, ReceiveState
from kv_transfer.receiver import KVReceiver, _Receiving
from kv_transfer.sender import KVSender
from prefill_worker.half import PrefillHalf

Plant = Callable[[pytest.MonkeyPatch], None]
BUGS: dict[str, Plant] = {}
"""By name; each is planted for as long as its patch lasts."""


def bug(plant: Plant) -> Plant:
    BUGS[plant.__name__] = plant
    return plant


# ---- the state machines


@bug
def an_attempt_that_is_over_begins_again(patch: pytest.MonkeyPatch) -> None:
    real = Ledger.open

    def open_(self: Any, ticket: Ticket, state: Any, now: float) -> Opened[Any]:
        self._fences.pop(ticket.transfer_id, None)
        return real(self, ticket, state, now)

    patch.setattr(Ledger, "open", open_)


@bug
def a_release_does_not_close_the_holding(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ledger, "close", lambda self, key: None)


@bug
def what_has_expired_is_renewed(patch: pytest.MonkeyPatch) -> None:
    """A router that was away comes back before anybody has looked: in between others may have got the blocks."""

    def renew(self: Holding[Any], now: float) -> None:
        self.lease_expires_at = now + self._limits.lease_s

    patch.setattr(Holding, "renew", renew)


@bug
def a_heartbeat_renews_whatever_there_is(patch: pytest.MonkeyPatch) -> None:
    def renew(self: Any, transfer_ids: Iterable[str], now: float) -> None:
        for holding in self._holdings.values():
            holding.renew(now)

    patch.setattr(Ledger, "renew", renew)


@bug
def what_runs_has_no_lease(patch: pytest.MonkeyPatch) -> None:
    real = Holding.expired

    def expired(self: Holding[Any], now: float) -> str | None:
        return None if self.state is ReceiveState.RUNNING else real(self, now)

    patch.setattr(Holding, "expired", expired)


@bug
def a_dead_transfer_is_kept_alive_by_a_live_router(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Holding, "_deadline", lambda self, now: None)
    patch.setattr(Holding, "limit", lambda self, deadline: None)


@bug
def what_has_expired_is_told_to_nobody(patch: pytest.MonkeyPatch) -> None:
    def expired(self: Any, now: float) -> list[Any]:
        for holding in [h for h in self._holdings.values() if h.expired(now)]:
            self.close(holding.ticket.key)
        return []

    patch.setattr(Ledger, "expired", expired)


# ---- the receiver


@bug
def damaged_payload_is_taken(patch: pytest.MonkeyPatch) -> None:
    from kv_transfer import receiver

    real = receiver.KVReceiver._take

    def take(self: KVReceiver, receiving: _Receiving, entry: Entry, payload: Tensor) -> None:
        write = self._storage.write

        def forgiving(*arguments: Any, **options: Any) -> int:
            write(*arguments, **options)
            return entry.record.checksum

        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(self._storage, "write", forgiving)
            real(self, receiving, entry, payload)

    patch.setattr(KVReceiver, "_take", take)


@bug
def a_transfer_is_complete_without_its_last_segment(patch: pytest.MonkeyPatch) -> None:
    from kv_transfer import receiver

    patch.setattr(receiver, "_complete", lambda receiving, record: len(receiving.received) >= len(record.segments) - 1)


@bug
def segments_of_a_cancelled_transfer_are_written(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KVReceiver, "_waiting", lambda self, key: self._receiving.get(key))


@bug
def segments_of_an_earlier_attempt_are_written(patch: pytest.MonkeyPatch) -> None:
    def waiting(self: KVReceiver, key: AttemptKey) -> _Receiving | None:
        return next((r for k, r in self._receiving.items() if k[0] == key[0] and r.waiting), None)

    patch.setattr(KVReceiver, "_waiting", waiting)


@bug
def segments_of_a_transfer_whose_lease_has_ended_are_written(patch: pytest.MonkeyPatch) -> None:
    """A sender that slept: nobody has looked at the lease since."""
    real = KVReceiver._guarded

    def guarded(self: KVReceiver, receiving: _Receiving, step: Callable[[], None]) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(receiving.holding, "expired", lambda now: None)
            return real(self, receiving, step)

    patch.setattr(KVReceiver, "_guarded", guarded)


@bug
def the_end_of_a_pair_fails_no_transfer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KVReceiver, "on_pair_down", lambda self, pair, epoch, reason: None)
    patch.setattr(KVSender, "on_pair_down", lambda self, pair, epoch, reason: None)


# ---- the sender


@bug
def the_record_leaves_out_the_last_segment(patch: pytest.MonkeyPatch) -> None:
    real = KVSender.commit

    def commit(self: KVSender, key: AttemptKey, token_ids: Any) -> CommitRecord:
        record = real(self, key, token_ids)
        return CommitRecord(record.segments[:-1], *_rest(record))

    patch.setattr(KVSender, "commit", commit)


def _rest(record: CommitRecord) -> tuple[int, int, bytes]:
    return record.num_tokens, record.num_skipped_tokens, record.skipped_prefix_hash


@bug
def what_was_cancelled_is_sent_all_the_same(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KVSender, "cancel", lambda self, key: None)


@bug
def an_attempt_that_was_cancelled_commits(patch: pytest.MonkeyPatch) -> None:
    real = KVSender.commit

    def commit(self: KVSender, key: AttemptKey, token_ids: Any) -> CommitRecord:
        if (sending := self._sending.get(key)) is None or sending.holding.live:
            return real(self, key, token_ids)
        return CommitRecord(tuple(sending.records), len(token_ids), len(sending.skipped_prefix), b"")

    patch.setattr(KVSender, "commit", commit)


@bug
def a_failed_transfer_is_told_to_nobody(patch: pytest.MonkeyPatch) -> None:
    def fail(self: KVSender, sending: Any, reason: str, message: str) -> None:
        sending.holding.drain(self._clock())

    patch.setattr(KVSender, "_fail", fail)


# ---- the halves and the worker


@bug
def a_prefill_that_ends_keeps_its_blocks(patch: pytest.MonkeyPatch) -> None:
    def drop(self: PrefillHalf, key: AttemptKey) -> None:
        self._attempts.pop(engine_id(key), None)
        self._sender.cancel(key)
        self._sender.release(key)

    patch.setattr(PrefillHalf, "drop", drop)


@bug
def a_decode_that_ends_keeps_its_transfer(patch: pytest.MonkeyPatch) -> None:
    def drop(self: DecodeHalf, key: AttemptKey) -> None:
        self._attempts.pop(engine_id(key), None)
        self._scheduler.release(engine_id(key))

    patch.setattr(DecodeHalf, "drop", drop)


@bug
def an_accept_that_comes_twice_is_obeyed_twice(patch: pytest.MonkeyPatch) -> None:
    def accept(self: DecodeHalf, command: Any) -> None:
        if attempt := self._attempts.get(engine_id(command.ticket.key)):
            attempt.first_token_id = command.first_token_id
            self._receiver.accept(command.ticket.key, command.record, command.deadline_s)
            if self._receiver._receiving[command.ticket.key].holding.state is ReceiveState.RUNNING:
                self.join(command.ticket.key, 0.0)

    patch.setattr(DecodeHalf, "accept", accept)


@bug
def a_command_that_comes_twice_begins_twice(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Worker, "_is_live", lambda self, key: False)


@bug
def earlier_attempts_go_on_beside_the_latest(patch: pytest.MonkeyPatch) -> None:
    """Two parts see to it that they don't, each by itself: the worker, and the ledger."""
    real = Ledger.open

    def open_(self: Any, ticket: Ticket, state: Any, now: float) -> Opened[Any]:
        return Opened(real(self, ticket, state, now).holding, None)

    patch.setattr(Ledger, "open", open_)
    patch.setattr(Worker, "_end_older", lambda self, ticket: None)


@bug
def attempts_outlive_their_session(patch: pytest.MonkeyPatch) -> None:
    real = Worker._handle

    def handle(self: Worker, message: Any) -> None:
        if isinstance(message, SessionClosed):
            self._sessions.discard(message.session)
        else:
            real(self, message)

    patch.setattr(Worker, "_handle", handle)


@bug
def an_unread_cancel_waits_for_the_engine(patch: pytest.MonkeyPatch) -> None:
    """Not delivered at once: what is queued still leaves."""
    from kv_transfer.plane import KVPlane

    patch.setattr(KVPlane, "cancel", lambda self, key: None)
