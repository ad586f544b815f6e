"""Holdings end when they should, attempts that are over stay over. Time is an argument."""

from __future__ import annotations

import itertools

import pytest

from core.errors import IntegrityError, TransferError
from core.ticket import Ticket
from kv_transfer.config import TransferConfig
from kv_transfer.ownership import Holding, Ledger, ReceiveState, SendState

LIMITS = TransferConfig(lease_s=5, progress_timeout_s=10, queue_timeout_s=100)
SEND_EDGES = {
    ("QUEUED", "PREFILLING"),
    ("PREFILLING", "COMMITTED"),
    *((state, "DRAINING") for state in ("QUEUED", "PREFILLING", "COMMITTED")),
    *((state, "RELEASED") for state in ("QUEUED", "PREFILLING", "COMMITTED", "DRAINING")),
}
RECEIVE_EDGES = {
    ("RESERVED", "ACCEPTED"),
    ("ACCEPTED", "RUNNING"),
    *((state, "DRAINING") for state in ("RESERVED", "ACCEPTED", "RUNNING")),
    *((state, "RELEASED") for state in ("RESERVED", "ACCEPTED", "RUNNING", "DRAINING")),
}


def ticket(attempt: int = 1, transfer_id: str = "t", *, local: bool = False) -> Ticket:
    return Ticket("r", attempt, transfer_id, "p", "p" if local else "d", 1)


@pytest.mark.parametrize(("states", "edges"), [(list(SendState), SEND_EDGES), (list(ReceiveState), RECEIVE_EDGES)])
def test_only_the_drawn_edges_can_be_taken(states: list[SendState | ReceiveState], edges: set[tuple[str, str]]) -> None:
    for start, end in itertools.product(states, states):
        holding = Holding(ticket(), start, LIMITS, 0.0)
        if (start.name, end.name) in edges:
            holding.advance(end, 0.0)
            assert holding.state is end
        else:
            with pytest.raises(IntegrityError, match=f"no way from {start.name} to {end.name}"):
                holding.advance(end, 0.0)
            assert holding.state is start


def test_a_lease_ends_unless_it_is_renewed() -> None:
    holding = Holding(ticket(), ReceiveState.RUNNING, LIMITS, 0.0)
    assert holding.expired(4.99) is None
    holding.renew(4.99)
    assert holding.expired(9.98) is None
    assert holding.expired(9.99) == "lease_expired"


def test_a_late_heartbeat_does_not_bring_a_lease_back() -> None:
    holding = Holding(ticket(), ReceiveState.RESERVED, LIMITS, 0.0)
    holding.renew(5.0)
    assert holding.expired(5.0) == "lease_expired"


@pytest.mark.parametrize(
    ("state", "patience_s"),
    [
        (SendState.QUEUED, 100),
        (SendState.PREFILLING, 10),
        (SendState.COMMITTED, 10),
        (ReceiveState.RESERVED, 100),
        (ReceiveState.ACCEPTED, 10),
        (ReceiveState.RUNNING, None),
    ],
)
def test_a_router_that_renews_cannot_keep_what_stands_still(
    state: SendState | ReceiveState, patience_s: float | None
) -> None:
    holding = Holding(ticket(), state, LIMITS, 0.0)
    ended_s = None
    for now in range(200):
        if holding.expired(now):
            ended_s = now
            assert holding.expired(now) == "progress_deadline"
            break
        holding.renew(now)
    assert ended_s == patience_s


def test_progress_moves_the_deadline_and_ends_the_patience_of_the_queue() -> None:
    holding = Holding(ticket(), ReceiveState.RESERVED, LIMITS, 0.0)
    holding.lease_expires_at = 1000.0
    holding.progressed(50.0)
    assert holding.expired(59.9) is None
    assert holding.expired(60.0) == "progress_deadline"


def test_the_deadline_of_an_accept_can_only_be_brought_forward() -> None:
    holding = Holding(ticket(), ReceiveState.ACCEPTED, LIMITS, 0.0)
    holding.limit(50.0)
    assert holding.progress_deadline == 10.0
    holding.limit(3.0)
    assert holding.expired(3.0) == "progress_deadline"


@pytest.mark.parametrize("state", [ReceiveState.RESERVED, ReceiveState.ACCEPTED, SendState.PREFILLING])
def test_a_local_attempt_has_a_lease_and_no_progress_deadline(state: SendState | ReceiveState) -> None:
    holding = Holding(ticket(local=True), state, LIMITS, 0.0)
    assert holding.progress_deadline is None
    assert holding.expired(5.0) == "lease_expired"


def test_a_newer_attempt_fences_the_older() -> None:
    ledger: Ledger[SendState] = Ledger(LIMITS)
    old = ledger.open(ticket(1), SendState.QUEUED, 0.0).holding
    opened = ledger.open(ticket(3), SendState.QUEUED, 0.0)
    assert opened.fenced is old
    assert not old.live
    assert ledger.find(("t", 1)) is None
    assert ledger.find(("t", 3)) is opened.holding
    ledger.close(("t", 1))  # what is said about the older does not reach the newer
    assert ledger.find(("t", 3)) is opened.holding
    assert len(ledger) == 1


@pytest.mark.parametrize("attempt", [1, 2])
@pytest.mark.parametrize("closed", [False, True])
def test_an_attempt_that_was_seen_cannot_begin_again(attempt: int, closed: bool) -> None:
    ledger: Ledger[ReceiveState] = Ledger(LIMITS)
    ledger.open(ticket(2), ReceiveState.RESERVED, 0.0)
    if closed:
        ledger.close(("t", 2))
    with pytest.raises(TransferError) as failure:
        ledger.open(ticket(attempt), ReceiveState.RESERVED, 0.0)
    assert failure.value.reason == "stale_attempt"


def test_a_heartbeat_renews_the_transfers_it_names_and_no_others() -> None:
    ledger: Ledger[ReceiveState] = Ledger(LIMITS)
    for name in ("a", "b"):
        ledger.open(ticket(transfer_id=name), ReceiveState.RUNNING, 0.0)
    ledger.renew(["a", "unknown"], 4.0)
    assert [(holding.ticket.transfer_id, reason) for holding, reason in ledger.expired(6.0)] == [("b", "lease_expired")]


def test_what_drains_is_told_again_when_nobody_releases_it_within_a_lease() -> None:
    """To close it would hide that its half still holds the blocks."""
    ledger: Ledger[ReceiveState] = Ledger(LIMITS)
    holding = ledger.open(ticket(), ReceiveState.RESERVED, 0.0).holding
    holding.drain(1.0)
    ledger.renew(["t"], 4.0)
    assert ledger.expired(5.9) == []
    for _ in range(2):
        assert ledger.expired(6.0) == [(holding, "lease_expired")]
    ledger.close(("t", 1))
    assert ledger.expired(6.0) == []


def test_integrity_is_what_is_held_and_nothing_else() -> None:
    ledger: Ledger[ReceiveState] = Ledger(LIMITS)
    ledger.open(ticket(), ReceiveState.RESERVED, 0.0)
    ledger.check_integrity([("t", 1)])
    for wrong in ([], [("t", 2)], [("t", 1), ("u", 1)]):
        with pytest.raises(IntegrityError):
            ledger.check_integrity(wrong)
