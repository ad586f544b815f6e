"""Whatever gets lost, comes twice, comes late or restarts: nothing stays held for a request that is gone."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from core.errors import TransferError
from core.ticket import AttemptKey, Ticket
from kv_transfer.config import TransferConfig
from kv_transfer.ownership import Ledger, ReceiveState, SendState

LIMITS = TransferConfig(lease_s=5, progress_timeout_s=10, queue_timeout_s=30)
LONGEST_S = 31
Message = tuple[str, Ticket]
numbers = st.integers(min_value=0, max_value=10**6)


class Side:
    """A worker half: a ledger and the blocks it answers for."""

    def __init__(self, first: SendState | ReceiveState) -> None:
        self.first = first
        self.ledger: Ledger = Ledger(LIMITS)  # type: ignore[type-arg]
        self.blocks: dict[AttemptKey, int] = {}
        self.highest: dict[str, int] = {}

    def begin(self, ticket: Ticket, now: float) -> None:
        try:
            opened = self.ledger.open(ticket, self.first, now)
        except TransferError:
            assert ticket.attempt <= self.highest[ticket.transfer_id]
            return
        assert ticket.attempt > self.highest.get(ticket.transfer_id, -1)
        self.highest[ticket.transfer_id] = ticket.attempt
        if opened.fenced is not None:
            del self.blocks[opened.fenced.ticket.key]
        self.blocks[ticket.key] = 1

    def step(self, key: AttemptKey, start: object, end: SendState | ReceiveState, now: float) -> None:
        holding = self.ledger.find(key)
        if holding is not None and holding.state is start and holding.expired(now) is None:
            holding.advance(end, now)

    def release(self, key: AttemptKey) -> None:
        self.ledger.close(key)
        self.blocks.pop(key, None)

    def expire(self, now: float) -> None:
        for holding, _ in self.ledger.expired(now):
            self.release(holding.ticket.key)

    def restart(self) -> None:
        self.__init__(self.first)  # type: ignore[misc]


class Ownership(RuleBasedStateMachine):
    """A router that retries, a network that loses, repeats and reorders, and two workers that may restart."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.prefill, self.decode = Side(SendState.QUEUED), Side(ReceiveState.RESERVED)
        self.attempts: dict[str, int] = {}
        self.wanted: set[str] = set()
        self.sent: list[Message] = []  # everything ever said: any of it may come again, at any time

    def say(self, *names: str, ticket: Ticket) -> None:
        self.sent += [(name, ticket) for name in names]

    def ticket(self, transfer_id: str) -> Ticket:
        return Ticket("r", self.attempts[transfer_id], transfer_id, "p", "d", 1)

    @rule(transfer_id=st.sampled_from("abcde"))
    def attempt(self, transfer_id: str) -> None:
        self.attempts[transfer_id] = self.attempts.get(transfer_id, 0) + 1
        self.wanted.add(transfer_id)
        self.say("reserve", "prefill", "commit", "accept", "ready", ticket=self.ticket(transfer_id))

    @rule(which=numbers)
    def give_up(self, which: int) -> None:
        if self.wanted:
            transfer_id = sorted(self.wanted)[which % len(self.wanted)]
            self.wanted.discard(transfer_id)
            self.say("release", ticket=self.ticket(transfer_id))

    @rule(which=numbers)
    def deliver(self, which: int) -> None:
        if not self.sent:
            return
        name, ticket = self.sent[which % len(self.sent)]
        key, now = ticket.key, self.now
        match name:
            case "reserve":
                self.decode.begin(ticket, now)
            case "prefill":
                self.prefill.begin(ticket, now)
                self.prefill.step(key, SendState.QUEUED, SendState.PREFILLING, now)
            case "commit":
                self.prefill.step(key, SendState.PREFILLING, SendState.COMMITTED, now)
            case "accept":
                self.decode.step(key, ReceiveState.RESERVED, ReceiveState.ACCEPTED, now)
            case "ready":
                self.decode.step(key, ReceiveState.ACCEPTED, ReceiveState.RUNNING, now)
            case "release":
                self.prefill.release(key)
                self.decode.release(key)

    @rule(seconds=st.sampled_from([0.3, 1.0, 4.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def heartbeat(self) -> None:
        self.prefill.ledger.renew(self.wanted, self.now)
        self.decode.ledger.renew(self.wanted, self.now)

    @rule()
    def look_for_expired(self) -> None:
        self.prefill.expire(self.now)
        self.decode.expire(self.now)

    @rule(decode=st.booleans())
    def restart(self, decode: bool) -> None:
        (self.decode if decode else self.prefill).restart()

    @invariant()
    def blocks_are_held_for_exactly_the_live_attempts(self) -> None:
        for side in (self.prefill, self.decode):
            side.ledger.check_integrity(side.blocks)

    @invariant()
    def one_attempt_of_a_transfer_at_most_is_live(self) -> None:
        for side in (self.prefill, self.decode):
            assert len({transfer_id for transfer_id, _ in side.blocks}) == len(side.blocks)

    def teardown(self) -> None:
        """With the router gone, and even with one that renews for ever, all but what runs is free in bounded time."""
        self.wanted = set(self.attempts)
        for _ in range(LONGEST_S):
            self.heartbeat()
            self.wait(1.0)
            self.look_for_expired()
        running = [self.decode.ledger.find(key) for key in self.decode.blocks]
        assert not self.prefill.blocks
        assert all(holding is not None and holding.state is ReceiveState.RUNNING for holding in running)
        self.wait(LIMITS.lease_s)
        self.look_for_expired()
        assert not self.decode.blocks


def test_nothing_stays_held_for_a_request_that_is_gone() -> None:
    run_state_machine_as_test(Ownership, settings=settings(max_examples=120, stateful_step_count=40, deadline=None))
