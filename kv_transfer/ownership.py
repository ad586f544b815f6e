"""Who holds blocks for which attempt, for how long, and in which state. Pure: time comes in as an argument.

The contract: the blocks of an attempt belong to the worker half that opened its holding, from `Ledger.open` until it
lets go of them, whatever happened in between. The KV plane touches them only while the holding is live: the sender
reads them inside `push`, the receiver writes them while segments come. From DRAINING on it touches nothing, and says
so once; `Ledger.close` ends the holding when the half has dropped its attempt.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar, cast

from core.errors import IntegrityError, TransferError
from core.ticket import AttemptKey, Ticket
from kv_transfer.config import TransferConfig


class SendState(Enum):
    """The prefill side.

    ```
    QUEUED ──▶ PREFILLING ──▶ COMMITTED (blocks held until the router's Release) ──▶ RELEASED
       └────────────┴─────────────┴──▶ DRAINING (no new segment leaves) ──▶ RELEASED
    ```
    """

    QUEUED = "queued"
    PREFILLING = "prefilling"
    COMMITTED = "committed"
    DRAINING = "draining"
    RELEASED = "released"


class ReceiveState(Enum):
    """The decode side. A local attempt, which needs no transfer, starts as RUNNING.

    ```
    RESERVED (blocks held) ──▶ ACCEPTED (record known, segments missing) ──▶ RUNNING ──▶ RELEASED
       └──────────────────────────┴──▶ DRAINING (late segments are discarded) ◀──┘
                                          └──▶ RELEASED
    ```
    """

    RESERVED = "reserved"
    ACCEPTED = "accepted"
    RUNNING = "running"
    DRAINING = "draining"
    RELEASED = "released"


State = TypeVar("State", bound=SendState | ReceiveState)

_NEXT: dict[SendState | ReceiveState, set[SendState | ReceiveState]] = {
    SendState.QUEUED: {SendState.PREFILLING, SendState.DRAINING, SendState.RELEASED},
    SendState.PREFILLING: {SendState.COMMITTED, SendState.DRAINING, SendState.RELEASED},
    SendState.COMMITTED: {SendState.DRAINING, SendState.RELEASED},
    SendState.DRAINING: {SendState.RELEASED},
    SendState.RELEASED: set(),
    ReceiveState.RESERVED: {ReceiveState.ACCEPTED, ReceiveState.DRAINING, ReceiveState.RELEASED},
    ReceiveState.ACCEPTED: {ReceiveState.RUNNING, ReceiveState.DRAINING, ReceiveState.RELEASED},
    ReceiveState.RUNNING: {ReceiveState.DRAINING, ReceiveState.RELEASED},
    ReceiveState.DRAINING: {ReceiveState.RELEASED},
    ReceiveState.RELEASED: set(),
}
_UNTIMED = {ReceiveState.RUNNING, SendState.DRAINING, ReceiveState.DRAINING, SendState.RELEASED, ReceiveState.RELEASED}
_QUEUED = {SendState.QUEUED, ReceiveState.RESERVED}
_DRAINING = {SendState.DRAINING, ReceiveState.DRAINING}
_RELEASED = {SendState.RELEASED, ReceiveState.RELEASED}
MAX_FENCES = 1 << 16
"""Transfers whose latest attempt a ledger remembers."""


class Holding(Generic[State]):
    """One attempt's claim on blocks: a lease, renewed by the router's heartbeats, and mostly a progress deadline.

    A router that lives can't keep a dead transfer, and a dead router can't keep anything. `progress_deadline` is None
    where a state may last: while running, while draining, and always for a local attempt.
    """

    def __init__(self, ticket: Ticket, state: State, limits: TransferConfig, now: float) -> None:
        self.ticket, self._limits = ticket, limits
        self.state: State = state
        self.lease_expires_at = now + limits.lease_s
        self.progress_deadline = self._deadline(now)

    @property
    def live(self) -> bool:
        """Neither draining nor released: its blocks may be touched."""
        return self.state not in _DRAINING and self.state not in _RELEASED

    def advance(self, state: State, now: float) -> None:
        """Move to `state`; `IntegrityError` where the automaton has no such edge."""
        if state not in _NEXT[self.state]:
            raise IntegrityError(f"transfer {self.ticket.key}: no way from {self.state.name} to {state.name}")
        self.state = state
        self.progress_deadline = self._deadline(now)

    def drain(self, now: float) -> None:
        """Its blocks are not touched any more, and are to be released within a lease; idempotent."""
        if self.live:
            self.advance(cast("State", type(self.state).DRAINING), now)
            self.lease_expires_at = now + self._limits.lease_s

    def progressed(self, now: float) -> None:
        """A segment was sent or has come: a transfer that was queued no longer is."""
        if self.progress_deadline is not None:
            self.progress_deadline = now + self._limits.progress_timeout_s

    def limit(self, deadline: float) -> None:
        """Bring the progress deadline forward."""
        if self.progress_deadline is None or deadline < self.progress_deadline:
            self.progress_deadline = deadline

    def renew(self, now: float) -> None:
        """The router still wants it. What has expired, or drains, stays so."""
        if self.live and self.expired(now) is None:
            self.lease_expires_at = now + self._limits.lease_s

    def expired(self, now: float) -> str | None:
        """`lease_expired` or `progress_deadline`, or None."""
        if self.state in _RELEASED:
            return None
        if now >= self.lease_expires_at:
            return "lease_expired"
        if self.progress_deadline is not None and now >= self.progress_deadline:
            return "progress_deadline"
        return None

    def _deadline(self, now: float) -> float | None:
        if self.state in _UNTIMED or self.ticket.local:
            return None
        limits = self._limits
        return now + (limits.queue_timeout_s if self.state in _QUEUED else limits.progress_timeout_s)


@dataclass(frozen=True, slots=True)
class Opened(Generic[State]):
    """A new holding, and the older attempt's that it fenced."""

    holding: Holding[State]
    fenced: Holding[State] | None


class Ledger(Generic[State]):
    """The holdings of one side of a worker; at most one attempt of a transfer, the latest, is live.

    Not thread-safe: its owner locks. Attempts that are over stay over: their latest number is remembered.
    """

    def __init__(self, limits: TransferConfig) -> None:
        self._limits = limits
        self._holdings: dict[str, Holding[State]] = {}  # by transfer id
        self._fences: OrderedDict[str, int] = OrderedDict()  # transfer id to its latest attempt, oldest first

    def __len__(self) -> int:
        return len(self._holdings)

    def open(self, ticket: Ticket, state: State, now: float) -> Opened[State]:
        """Begin a holding, and fence any older attempt: from now on it drains, and is not found any more.

        Raises TransferError `stale_attempt` where this attempt or a later one of the transfer has been seen.
        """
        transfer_id, latest = ticket.transfer_id, self._fences.get(ticket.transfer_id)
        if latest is not None and ticket.attempt <= latest:
            raise TransferError("stale_attempt", f"attempt {ticket.attempt} comes after attempt {latest}")
        self._fences[transfer_id] = ticket.attempt
        self._fences.move_to_end(transfer_id)
        while len(self._fences) > MAX_FENCES:
            self._fences.popitem(last=False)
        if fenced := self._holdings.get(transfer_id):
            fenced.drain(now)
        holding = self._holdings[transfer_id] = Holding(ticket, state, self._limits, now)
        return Opened(holding, fenced)

    def find(self, key: AttemptKey) -> Holding[State] | None:
        """None for an attempt that is unknown, fenced or over."""
        holding = self._holdings.get(key[0])
        return holding if holding is not None and holding.ticket.key == key else None

    def close(self, key: AttemptKey) -> None:
        """End a holding; idempotent, legal in every state."""
        if self.find(key) is not None:
            del self._holdings[key[0]]

    def renew(self, transfer_ids: Iterable[str], now: float) -> None:
        for transfer_id in transfer_ids:
            if holding := self._holdings.get(transfer_id):
                holding.renew(now)

    def check_integrity(self, keys: Iterable[AttemptKey]) -> None:
        """`IntegrityError` unless exactly the attempts `keys` have holdings, each the latest of its transfer."""
        held, expected = {holding.ticket.key for holding in self._holdings.values()}, set(keys)
        if held != expected:
            raise IntegrityError(f"held without a transfer: {held - expected}; not held: {expected - held}")
        for transfer_id, attempt in held:
            if self._fences.get(transfer_id, attempt) != attempt:
                raise IntegrityError(f"transfer {transfer_id}: attempt {attempt} is held, and is not the latest")

    def expired(self, now: float) -> list[tuple[Holding[State], str]]:
        """Holdings whose time is up, with the reason.

        Among them those that drain, have been told of, and were not closed within a lease: nothing is closed here, for
        who holds the blocks would not hear of it.
        """
        timed = [(holding, holding.expired(now)) for holding in self._holdings.values()]
        return [(holding, reason) for holding, reason in timed if reason is not None]
