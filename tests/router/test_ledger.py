"""The ledger's proof finds what is wrong: each test breaks one invariant."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from core.errors import IntegrityError
from core.messages import Work
from core.ticket import Ticket
from router.ledger import Attempt, Entry, Ledger, Stage, Usage
from router.silent import Silent
from tests.router.test_admission import entry

GRANTED = {"p": 2, "d": 2}


def running(ledger: Ledger, seq: int = 0) -> Entry:
    """A request that decodes, its prefill worker told to let go."""
    one = entry(seq)
    ledger.open(one)
    ticket = Ticket("r", 1, one.transfer_id, "p", "d", 1)
    one.attempt = Attempt(ticket, Work((1,), 1, one.request.sampling), Stage.DECODING, 0.0)
    ledger.hold(one, ticket, "p", pending_tokens=5).closing = True
    ledger.hold(one, ticket, "d", pending_blocks=3)
    return one


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(Silent())


def test_a_sound_ledger_passes(ledger: Ledger) -> None:
    running(ledger)
    queued = entry(1)
    ledger.open(queued)
    ledger.check_integrity([queued], GRANTED)


def test_usage_adds_up_and_falls_back_to_nothing(ledger: Ledger) -> None:
    one, two = running(ledger, 0), running(ledger, 1)
    assert ledger.usage("p") == Usage(2, 10, 0)
    ledger.settle(one.holds[0])
    assert ledger.usage("p") == Usage(2, 5, 0)
    for hold in [*one.holds, *two.holds]:
        ledger.drop(hold)
    assert ledger.usage("p") == ledger.usage("d") == Usage()


def test_an_entry_stays_until_its_end_and_its_last_hold(ledger: Ledger) -> None:
    one = running(ledger)
    ledger.end(one)
    assert (ledger.num_live, ledger.num_entries) == (0, 1)
    for hold in [*one.holds]:
        ledger.drop(hold)
    assert ledger.num_entries == 0


def test_transfers_of_closing_holds_are_not_live(ledger: Ledger) -> None:
    one = running(ledger)
    assert ledger.live_transfer_ids("d") == (one.transfer_id,)
    assert ledger.live_transfer_ids("p") == ()
    assert ledger.live_transfer_ids("nobody") == ()


def forget_attempt(ledger: Ledger, one: Entry) -> None:
    one.attempt = None


def forget_hold(ledger: Ledger, one: Entry) -> None:
    del ledger._holds["d"]


def miscount(ledger: Ledger, one: Entry) -> None:
    ledger._usage["d"].num_credits += 1


def overcommit(ledger: Ledger, one: Entry) -> None:
    running(ledger, 1)
    running(ledger, 2)


def end_without_telling(ledger: Ledger, one: Entry) -> None:
    one.ended = True


def lose_entry(ledger: Ledger, one: Entry) -> None:
    del ledger._by_transfer[one.transfer_id]


def hold_where_nobody_is(ledger: Ledger, one: Entry) -> None:
    assert one.attempt is not None
    ledger.hold(one, one.attempt.ticket, "gone")


@pytest.mark.parametrize(
    "damage",
    [forget_attempt, forget_hold, miscount, overcommit, end_without_telling, lose_entry, hold_where_nobody_is],
)
def test_damage_is_found(ledger: Ledger, damage: Callable[[Ledger, Entry], None]) -> None:
    one = running(ledger)
    ledger.check_integrity([], GRANTED)
    damage(ledger, one)
    with pytest.raises(IntegrityError):
        ledger.check_integrity([], GRANTED)


def test_a_queued_request_that_runs_is_found(ledger: Ledger) -> None:
    one = running(ledger)
    with pytest.raises(IntegrityError, match="queued"):
        ledger.check_integrity([one], GRANTED)


def test_a_queued_request_that_is_over_is_found(ledger: Ledger) -> None:
    with pytest.raises(IntegrityError, match="not live"):
        ledger.check_integrity([entry(0)], GRANTED)
