"""A request moves between two real decode workers: its K and V travel, and its tokens stay what they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
from llguidance import LLMatcher

from core.messages import (
    Accept,
    Accepted,
    Connect,
    Drain,
    PairUp,
    Prefill,
    Prefilled,
    Refused,
    Release,
    Released,
    Reserve,
    Reserved,
    Work,
    WorkerRole,
)
from core.request import FinishReason
from core.sampling import SamplingParams
from core.ticket import Ticket
from tests.cluster.running_worker import (
    CONFIG,
    WAIT_S,
    Router,
    Running,
    begin,
    generate_locally,
    new_name,
    prompt_of,
    rest,
    work,
)

WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 3, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    {"temperature": 0.8, "seed": 4, "grammar": LLMatcher.grammar_from_regex("([a-z]{3,5} )+"), "logprobs": 2},
]


@dataclass
class Trio:
    """A prefill worker and two decode workers; `routers` are one router's sessions with them."""

    workers: dict[str, Running]
    routers: dict[str, Router]

    def connect(self, sender: str, receiver: str, epoch: int) -> None:
        meeting = Connect(
            sender, receiver, epoch, self.workers[receiver].kv.address, self.workers[receiver].engine.layout
        )
        for name in (sender, receiver):
            self.routers[name].say(meeting)
        for name in (sender, receiver):
            assert self.routers[name].next(PairUp) == PairUp(sender, receiver, epoch, "shm")


@pytest.fixture(scope="module")
def workers() -> Iterator[dict[str, Running]]:
    roles = {"p": WorkerRole.PREFILL, "a": WorkerRole.DECODE, "b": WorkerRole.DECODE}
    running = {name: Running(name, role) for name, role in roles.items()}
    yield running
    for each in running.values():
        each.close()
        assert each.error is None
        assert each.engine.pool.num_free_blocks == each.engine.pool.num_blocks


@pytest.fixture
def trio(workers: dict[str, Running]) -> Iterator[Trio]:
    trio = Trio(workers, {name: Router(running) for name, running in workers.items()})
    trio.connect("p", "a", 1)
    trio.connect("a", "b", 1)
    yield trio
    for running in workers.values():
        running.steps.resume()
    for router in trio.routers.values():
        router.hang_up()


def continued(the_work: Work, token_ids: list[int]) -> Work:
    return replace(the_work, token_ids=(*the_work.token_ids, *token_ids))


def alone(the_work: Work) -> list[int]:
    running = Running("m", WorkerRole.MIXED)
    try:
        return generate_locally(Router(running), the_work)
    finally:
        running.close()


def decode_some(trio: Trio, ticket: Ticket, the_work: Work, num_tokens: int) -> list[int]:
    """The request decodes on worker a; its tokens, at least so many."""
    token_ids = [begin(trio.routers["p"], trio.routers["a"], ticket, the_work)]
    for sequence in trio.routers["a"].tokens(ticket.key):
        token_ids += sequence.token_ids
        if len(token_ids) >= num_tokens:
            return token_ids
    pytest.fail("it ended before it could move")


def hand_over(trio: Trio, ticket: Ticket, the_work: Work) -> tuple[Reserved, Prefilled]:
    a, b = trio.routers["a"], trio.routers["b"]
    b.say(Reserve(ticket, the_work))
    reserved = b.next(Reserved, ticket.key)
    a.say(Prefill(ticket, the_work, reserved.num_skipped_tokens, handover=True))
    prefilled = a.next(Prefilled, ticket.key)
    assert prefilled.record is not None
    b.say(Accept(ticket, prefilled.record, prefilled.first_token_id, WAIT_S))
    b.next(Accepted, ticket.key)
    a.say(Release(ticket))
    a.next(Released, ticket.key)
    return reserved, prefilled


@pytest.mark.parametrize("way", range(len(WAYS)))
def test_a_request_that_moves_writes_what_it_writes_alone(trio: Trio, way: int) -> None:
    """Also when it has not yet filled a block, and when the worker that it leaves drains."""
    for num_prompt, num_tokens in ((5, 3), (70, 40)):
        the_work = work(prompt_of(num_prompt, first=way), 120, **WAYS[way])
        name = new_name()
        first, second = Ticket("r", 1, name, "p", "a", 1), Ticket("r", 2, name, "a", "b", 1)
        token_ids = decode_some(trio, first, the_work, num_tokens)
        _, prefilled = hand_over(trio, second, continued(the_work, token_ids))
        assert trio.routers["a"].failure(first.key) == "stale_attempt"
        assert prefilled.num_cached_tokens == num_prompt + len(token_ids) - 1  # nothing is computed twice
        token_ids += [prefilled.first_token_id, *rest(trio.routers["b"], second.key)]
        for router in trio.routers.values():
            router.until_idle()
        assert token_ids == alone(the_work)


def test_a_second_move_back_sends_only_what_is_new(trio: Trio) -> None:
    """Blocks that the first worker still has are found at its reservation."""
    trio.connect("b", "a", 1)
    the_work, name = work(prompt_of(70), 120), new_name()
    tickets = [Ticket("r", 1, name, "p", "a", 1), Ticket("r", 2, name, "a", "b", 1), Ticket("r", 3, name, "b", "a", 1)]
    token_ids = decode_some(trio, tickets[0], the_work, 5)
    _, prefilled = hand_over(trio, tickets[1], continued(the_work, token_ids))
    token_ids.append(prefilled.first_token_id)
    there_and_back = Trio(trio.workers, {"a": trio.routers["b"], "b": trio.routers["a"]})
    for sequence in trio.routers["b"].tokens(tickets[1].key):
        token_ids += sequence.token_ids
        if len(token_ids) > 30:
            break
    reserved, prefilled = hand_over(there_and_back, tickets[2], continued(the_work, token_ids))
    assert reserved.num_skipped_tokens >= 64
    token_ids += [prefilled.first_token_id, *rest(trio.routers["a"], tickets[2].key)]
    assert token_ids == alone(the_work)


def test_a_decode_worker_takes_no_other_prompts(trio: Trio) -> None:
    ticket = Ticket("r", 1, new_name(), "a", "b", 1)
    trio.routers["a"].say(Prefill(ticket, work(prompt_of(20))))
    assert trio.routers["a"].failure(ticket.key) == "wrong_role"


def test_a_draining_worker_hands_over_what_it_decodes_and_ends() -> None:
    roles = {"p": WorkerRole.PREFILL, "a": WorkerRole.DECODE, "b": WorkerRole.DECODE}
    running = {name: Running(name, role) for name, role in roles.items()}
    trio = Trio(running, {name: Router(each) for name, each in running.items()})
    try:
        trio.connect("p", "a", 1)
        trio.connect("a", "b", 1)
        the_work, name = work(prompt_of(40), 300), new_name()
        token_ids = decode_some(trio, Ticket("r", 1, name, "p", "a", 1), the_work, 4)
        running["a"].worker.post(Drain(60.0))
        other = Ticket("s", 1, new_name(), "p", "a", 1)
        trio.routers["a"].say(Reserve(other, the_work))
        assert trio.routers["a"].next(Refused, other.key).reason == "draining"
        second = Ticket("r", 2, name, "a", "b", 1)
        _, prefilled = hand_over(trio, second, continued(the_work, token_ids))
        assert running["a"].wait() is None
        token_ids += [prefilled.first_token_id, *rest(trio.routers["b"], second.key)]
        assert len(token_ids) == 300
    finally:
        for each in running.values():
            each.close()


# ---- copies

COPY = SamplingParams(max_tokens=2, temperature=0.0)


def copy(trio: Trio, sender: str, receiver: str, the_work: Work, num_tokens: int, epoch: int = 1) -> Reserved:
    """The first tokens' K and V, from one cache to the other, as a router says it."""
    ticket = Ticket("copy", 1, new_name(), sender, receiver, epoch)
    what = Work(the_work.token_ids[: num_tokens + 1], num_tokens + 1, COPY, 0, the_work.cache_salt)
    kept = replace(what, sampling=replace(COPY, max_tokens=1))
    to, fro = trio.routers[receiver], trio.routers[sender]
    to.say(Reserve(ticket, kept, copy=True))
    reserved = to.next(Reserved, ticket.key)
    fro.say(Prefill(ticket, what, reserved.num_skipped_tokens, handover=True, copy=True))
    prefilled = fro.next(Prefilled, ticket.key)
    assert prefilled.record is not None
    to.say(Accept(ticket, prefilled.record, prefilled.first_token_id, WAIT_S))
    to.next(Accepted, ticket.key)
    assert [sequence.finish for sequence in to.tokens(ticket.key)] == [FinishReason.LENGTH]
    fro.say(Release(ticket))
    fro.next(Released, ticket.key)
    return reserved


def test_what_went_ahead_need_not_go_with_the_request(trio: Trio) -> None:
    the_work, name = work(prompt_of(200), 300), new_name()
    first, second = Ticket("r", 1, name, "p", "a", 1), Ticket("r", 2, name, "a", "b", 1)
    token_ids = decode_some(trio, first, the_work, 5)
    assert copy(trio, "a", "b", the_work, 96).num_skipped_tokens == 0
    assert copy(trio, "a", "b", the_work, 192).num_skipped_tokens == 96
    for sequence in trio.routers["a"].tokens(first.key):
        token_ids += sequence.token_ids
        if len(token_ids) > 20:
            break
    reserved, prefilled = hand_over(trio, second, continued(the_work, token_ids))
    assert reserved.num_skipped_tokens == 192
    token_ids += [prefilled.first_token_id, *rest(trio.routers["b"], second.key)]
    assert token_ids == alone(the_work)


def test_a_prefill_worker_gets_back_what_a_decode_worker_wrote(trio: Trio) -> None:
    """The next turn of a conversation: prompt, answer, and what the user says to that."""
    trio.connect("a", "p", 1)
    asked, name = work(prompt_of(100), 60, salt="chat"), new_name()
    answer = [begin(trio.routers["p"], trio.routers["a"], Ticket("r", 1, name, "p", "a", 1), asked)]
    answer += rest(trio.routers["a"], (name, 1))
    turn = work((*asked.token_ids, *answer, *prompt_of(30, first=77)), 20, salt="chat")
    copy(trio, "a", "p", turn, 144)
    ticket = Ticket("s", 1, new_name(), "p", "a", 1)
    trio.routers["a"].say(Reserve(ticket, turn))
    skipped = trio.routers["a"].next(Reserved, ticket.key).num_skipped_tokens
    trio.routers["p"].say(Prefill(ticket, turn, skipped))
    prefilled = trio.routers["p"].next(Prefilled, ticket.key)
    assert prefilled.num_cached_tokens == 144
    assert prefilled.record is not None
    trio.routers["a"].say(Accept(ticket, prefilled.record, prefilled.first_token_id, WAIT_S))
    assert [prefilled.first_token_id, *rest(trio.routers["a"], ticket.key)] == alone(turn)
    trio.routers["p"].say(Release(ticket))
    trio.routers["p"].next(Released, ticket.key)


def test_what_is_not_cached_is_not_copied(trio: Trio) -> None:
    ticket, the_work = Ticket("copy", 1, new_name(), "a", "b", 1), work(prompt_of(40))
    trio.routers["a"].say(Prefill(ticket, the_work, 0, handover=True, copy=True))
    assert trio.routers["a"].failure(ticket.key) == "not_cached"
    trio.routers["a"].until_idle()


def test_what_is_handed_over_does_not_wait_behind_those_that_have_no_room() -> None:
    """Others are parked, and blocks that it gave back would be theirs at once: so it keeps its own."""
    roles = {"p": WorkerRole.PREFILL, "a": WorkerRole.DECODE, "b": WorkerRole.DECODE}
    configs = {name: replace(CONFIG, num_blocks=12) if name == "a" else CONFIG for name in roles}
    running = {name: Running(name, role, config=configs[name]) for name, role in roles.items()}
    trio = Trio(running, {name: Router(each) for name, each in running.items()})
    try:
        trio.connect("p", "a", 1)
        trio.connect("a", "b", 1)
        works = [work(prompt_of(33, first=i), 140) for i in range(2)]
        names = [new_name(), new_name()]
        running["a"].steps.stop_at = lambda plan: bool(plan.swaps_out)
        tokens = [
            [begin(trio.routers["p"], trio.routers["a"], Ticket("r", 1, name, "p", "a", 1), each)]
            for name, each in zip(names, works, strict=True)
        ]
        running["a"].steps.begun.get(timeout=WAIT_S)
        seen = trio.routers["a"].tokens((names[0], 1))
        while len(tokens[0]) < 60:
            tokens[0] += next(seen).token_ids
        second = Ticket("r", 2, names[0], "a", "b", 1)
        running["a"].steps.resume()
        _, prefilled = hand_over(trio, second, continued(works[0], tokens[0]))
        assert prefilled.num_cached_tokens == 33 + len(tokens[0]) - 1
        tokens[0] += [prefilled.first_token_id, *rest(trio.routers["b"], second.key)]
        tokens[1] += rest(trio.routers["a"], (names[1], 1))
        assert tokens == [alone(each) for each in works]
        trio.routers["a"].until_idle()
    finally:
        for each in running.values():
            each.close()
