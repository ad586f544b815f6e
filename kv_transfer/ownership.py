"""Who holds blocks for which attempt, for how long, and in which state. Pure: time comes in as an argument."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

from core.errors import IntegrityError, TransferError
from core.ticket import AttemptKey, Ticket


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
       └──────────────────────────┴──▶ DRAINING (late segments are discarded) ──▶ RELEASED
    ```
    """

    RESERVED = "reserved"
    ACCEPTED = "accepted"
    RUNNING = "running"
    DRAINING = "draining"
    RELEASED = "released"


State = TypeVar("State", SendState, ReceiveState)

_SEND = {
    SendState.QUEUED: {SendState.PREFILLING, SendState.DRAINING, SendState.RELEASED},
    SendState.PREFILLING: {SendState.COMMITTED, SendState.DRAINING, SendState.RELEASED},
    SendState.COMMITTED: {SendState.DRAINING, SendState.RELEASED},
    SendState.DRAINING: {SendState.RELEASED},
    SendState.RELEASED: set[SendState](),
}
_RECEIVE = {
    ReceiveState.RESERVED: {ReceiveState.ACCEPTED, ReceiveState.DRAINING, ReceiveState.RELEASED},
    ReceiveState.ACCEPTED: {ReceiveState.RUNNING, ReceiveState.DRAINING, ReceiveState.RELEASED},
    ReceiveState.RUNNING: {ReceiveState.DRAINING, ReceiveState.RELEASED},
    ReceiveState.DRAINING: {ReceiveState.RELEASED},
    ReceiveState.RELEASED: set[ReceiveState](),
}
_UNTIMED = (ReceiveState.RUNNING, SendState.DRAINING, ReceiveState.DRAINING)
_QUEUED = (SendState.QUEUED, ReceiveState.RESERVED)


@dataclass(slots=True)
class Holding(Generic[State]):
    """One attempt's claim on blocks. `progress_deadline` is None in states that may last."""

    ticket: Ticket
    state: State
    lease_expires_at: float
    progress_deadline: float | None


class Holdings(Generic[State]):
    """The claims of one side of a worker.

    Each has a lease, renewed by the router's heartbeats, and in most states a progress deadline, moved on by progress:
    a router that lives can't keep a dead transfer, and a dead router can't keep anything. Expiry frees nothing by
    itself: the worker asks for what has `expired` and drops it.
    """

    def __init__(self, *, lease_s: float, progress_timeout_s: float, queue_timeout_s: float) -> None:
        self._lease_s, self._progress_timeout_s, self._queue_timeout_s = lease_s, progress_timeout_s, queue_timeout_s
        self._holdings: dict[AttemptKey, Holding[State]] = {}

    def __contains__(self, key: AttemptKey) -> bool:
        return key in self._holdings

    def __getitem__(self, key: AttemptKey) -> Holding[State]:
        return self._holdings[key]

    def __len__(self) -> int:
        return len(self._holdings)

    def open(self, ticket: Ticket, state: State, now: float) -> Holding[State]:
        """Begin a claim. Raises TransferError `stale_attempt` where a later attempt of the transfer is known."""
        for transfer_id, attempt in self._holdings:
            if transfer_id == ticket.transfer_id and attempt >= ticket.attempt:
                raise TransferError("stale_attempt", f"attempt {ticket.attempt} comes after attempt {attempt}")
        holding = Holding(ticket, state, now + self._lease_s, self._deadline(state, now))
        self._holdings[ticket.key] = holding
        return holding

    def advance(self, key: AttemptKey, state: State, now: float) -> None:
        """Move to `state`; `IntegrityError` where the automaton has no such edge."""
        holding = self._holdings[key]
        if state not in _next(holding.state):
            raise IntegrityError(f"transfer {key}: no way from {holding.state.name} to {state.name}")
        holding.state = state
        holding.progress_deadline = self._deadline(state, now)

    def progressed(self, key: AttemptKey, now: float) -> None:
        """A segment was sent or has come."""
        holding = self._holdings[key]
        holding.progress_deadline = self._deadline(holding.state, now)

    def limit(self, key: AttemptKey, deadline: float) -> None:
        """Bring the progress deadline forward."""
        holding = self._holdings[key]
        if holding.progress_deadline is None or deadline < holding.progress_deadline:
            holding.progress_deadline = deadline

    def renew(self, transfer_ids: Iterable[str], now: float) -> None:
        wanted = set(transfer_ids)
        for (transfer_id, _), holding in self._holdings.items():
            if transfer_id in wanted:
                holding.lease_expires_at = now + self._lease_s

    def expired(self, now: float) -> list[tuple[AttemptKey, str]]:
        """Claims that have ended, with `lease_expired` or `progress_deadline`."""
        found = []
        for key, holding in self._holdings.items():
            if now >= holding.lease_expires_at:
                found.append((key, "lease_expired"))
            elif holding.progress_deadline is not None and now >= holding.progress_deadline:
                found.append((key, "progress_deadline"))
        return found

    def close(self, key: AttemptKey) -> Holding[State] | None:
        """End a claim; idempotent."""
        return self._holdings.pop(key, None)

    def _deadline(self, state: State, now: float) -> float | None:
        if state in _UNTIMED:
            return None
        return now + (self._queue_timeout_s if state in _QUEUED else self._progress_timeout_s)


def _next(state: SendState | ReceiveState) -> Iterable[SendState | ReceiveState]:
    return _SEND[state] if isinstance(state, SendState) else _RECEIVE[state]
