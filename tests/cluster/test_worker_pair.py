"""Two workers, a channel between them: tokens are those of one worker alone, and whatever ends early leaves nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from core.messages import (
    Accept,
    AttemptFailed,
    Cancel,
    PairUp,
    Prefill,
    Prefilled,
    PromptPart,
    Refused,
    Release,
    Released,
    Reserve,
    Reserved,
    Work,
    WorkerRole,
)
from core.ticket import CommitRecord, Segment, SegmentRecord, Ticket, prefix_hash
from engine.config import SpeculativeConfig
from tests.cluster.running_worker import (
    CONFIG,
    MODEL,
    WAIT_S,
    Duo,
    Router,
    Running,
    begin,
    generate_locally,
    new_name,
    prompt_of,
    rest,
    work,
)


@pytest.fixture(scope="module")
def duo() -> Iterator[Duo]:
    duo = Duo()
    yield duo
    duo.close()
    for running in (duo.prefill, duo.decode):
        assert running.error is None
        assert running.engine.pool.num_free_blocks == running.engine.pool.num_blocks


@dataclass
class Both:
    """One router's sessions with the two."""

    duo: Duo
    prefill: Router
    decode: Router

    def ticket(self, name: str | None = None, attempt: int = 1, epoch: int = 1) -> Ticket:
        return self.duo.ticket(name or new_name(), attempt, epoch)

    def until_idle(self) -> None:
        self.prefill.until_idle()
        self.decode.until_idle()


@pytest.fixture
def both(duo: Duo) -> Iterator[Both]:
    both = Both(duo, Router(duo.prefill), Router(duo.decode))
    for router in (both.prefill, both.decode):
        router.say(duo.connect)
    for router in (both.prefill, both.decode):
        assert router.next(PairUp) == PairUp("p", "d", 1, "shm")
    yield both
    duo.prefill.steps.resume()
    duo.decode.steps.resume()
    both.prefill.hang_up()
    both.decode.hang_up()
    assert duo.prefill.error is None
    assert duo.decode.error is None


# ---- tokens

SAMPLINGS: list[dict[str, Any]] = [{}, {"temperature": 0.8, "seed": 5}, {"temperature": 1.0, "top_p": 0.9, "top_k": 40}]


def test_tokens_are_those_of_one_worker_alone(both: Both) -> None:
    """Prompts around the edges of a block and of a chunk, begun one after the other, decoded together."""
    works = [
        work(prompt_of(num_tokens, first=num_tokens), 12, **SAMPLINGS[i % 3])
        for i, num_tokens in enumerate((1, 15, 16, 17, 64, 65, 150))
    ]
    tickets = [both.ticket() for _ in works]
    firsts = [begin(both.prefill, both.decode, t, w) for t, w in zip(tickets, works, strict=True)]
    disaggregated = [[first, *rest(both.decode, t.key)] for first, t in zip(firsts, tickets, strict=True)]
    both.until_idle()
    alone = Running("m", WorkerRole.MIXED)
    try:
        router = Router(alone)
        assert [generate_locally(router, each) for each in works] == disaggregated
        router.until_idle()
    finally:
        alone.close()
    assert all(len(tokens) == 12 for tokens in disaggregated)


def test_a_resumed_request_goes_on_where_it_was(both: Both) -> None:
    prompt = prompt_of(40)
    whole = work(prompt, 10, temperature=0.9, seed=3)
    ticket = both.ticket()
    tokens = [begin(both.prefill, both.decode, ticket, whole), *rest(both.decode, ticket.key)]
    resumed = Work((*prompt, *tokens[:4]), len(prompt), whole.sampling)
    again = both.ticket()
    assert [begin(both.prefill, both.decode, again, resumed), *rest(both.decode, again.key)] == tokens[4:]


def test_a_prompt_in_parts_is_the_same_prompt(both: Both) -> None:
    prompt = prompt_of(100)
    ticket, whole = both.ticket(), both.ticket()
    parts = [PromptPart(ticket, 0, prompt[:40]), PromptPart(ticket, 40, prompt[40:80])]
    both.decode.say(*parts)
    both.prefill.say(*parts)
    got = [begin(both.prefill, both.decode, ticket, work(prompt, offset=80)), *rest(both.decode, ticket.key)]
    assert [begin(both.prefill, both.decode, whole, work(prompt)), *rest(both.decode, whole.key)] == got


def test_a_part_said_again_counts_once(both: Both) -> None:
    ticket, prompt = both.ticket(), prompt_of(30)
    both.decode.say(*[PromptPart(ticket, 0, prompt[:20])] * 2, Reserve(ticket, work(prompt, offset=20)))
    assert both.decode.next(Reserved, ticket.key)


def test_a_prompt_with_a_part_missing_is_refused(both: Both) -> None:
    ticket, prompt = both.ticket(), prompt_of(30)
    both.decode.say(PromptPart(ticket, 0, prompt[:10]), Reserve(ticket, work(prompt, offset=20)))
    failed = both.decode.next(AttemptFailed, ticket.key)
    assert (failed.reason, failed.message) == ("invalid", "20 prompt tokens came, 30 were announced")
    both.decode.until_idle()


# ---- prefixes


def test_a_prefix_that_decode_has_is_not_sent_again(both: Both) -> None:
    prompt, salt = prompt_of(150), new_name()
    layout = both.duo.decode.engine.layout
    records, outputs = [], []
    for _ in range(2):
        ticket, the_work = both.ticket(), work(prompt, 12, salt=salt)
        both.decode.say(Reserve(ticket, the_work))
        reserved = both.decode.next(Reserved, ticket.key)
        both.prefill.say(Prefill(ticket, the_work, reserved.num_skipped_tokens))
        prefilled = both.prefill.next(Prefilled, ticket.key)
        assert prefilled.record is not None
        both.decode.say(Accept(ticket, prefilled.record, prefilled.first_token_id, WAIT_S))
        both.prefill.say(Release(ticket))
        outputs.append([prefilled.first_token_id, *rest(both.decode, ticket.key)])
        records.append(prefilled.record)
    assert [record.num_skipped_tokens for record in records] == [0, 144]
    token_bytes = layout.num_layers * layout.bytes_per_token_per_layer
    assert [record.num_bytes for record in records] == [150 * token_bytes, 6 * token_bytes]
    assert outputs[0] == outputs[1]


def test_what_the_prefill_worker_finds_is_sent_though_not_computed(both: Both) -> None:
    prompt, salt = prompt_of(150), new_name()
    warm = both.ticket()
    both.prefill.say(Prefill(warm, work(prompt[:100], 1, salt=salt)))
    both.prefill.next(Prefilled, warm.key)
    ticket, alone = both.ticket(), both.ticket()
    hits = hits_of(both.prefill)
    tokens = [begin(both.prefill, both.decode, ticket, work(prompt, 12, salt=salt)), *rest(both.decode, ticket.key)]
    assert hits_of(both.prefill) - hits == 96
    assert [begin(both.prefill, both.decode, alone, work(prompt, 12)), *rest(both.decode, alone.key)] == tokens


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_decode_guesses_and_the_tokens_stay_the_same(both: Both, method: Any) -> None:
    """Several tokens in one step, told in one event."""
    model = str(MODEL) if method == "draft_model" else None
    guessing = Duo(replace(CONFIG, speculative_config=SpeculativeConfig(method=method, model=model)))
    prompt = prompt_of(20) * 4
    works = [work(prompt[: 60 + i], 40, temperature=0.2 * i, seed=i) for i in range(3)]
    try:
        prefill, decode = Router(guessing.prefill), Router(guessing.decode)
        for router in (prefill, decode):
            router.say(guessing.connect)
        for router in (prefill, decode):
            router.next(PairUp)
        for the_work in works:
            plain, ticket = both.ticket(), guessing.ticket(new_name())
            expected = [begin(both.prefill, both.decode, plain, the_work), *rest(both.decode, plain.key)]
            first = begin(prefill, decode, ticket, the_work)
            sequences = [*decode.tokens(ticket.key)]
            assert [first, *(token_id for s in sequences for token_id in s.token_ids)] == expected
        assert any(len(s.token_ids) > 1 for s in sequences)
        decode.until_idle()
        assert decode.load is not None
        assert decode.load.num_draft_tokens >= decode.load.num_accepted_tokens > 0
    finally:
        guessing.close()


def hits_of(router: Router) -> int:
    router.catch_up()
    assert router.load is not None
    return router.load.num_prefix_hits


# ---- idempotence and attempts


def test_commands_said_twice_are_obeyed_once(both: Both) -> None:
    ticket, the_work = both.ticket(), work(prompt_of(20), 6)
    both.decode.say(*[Reserve(ticket, the_work)] * 2)
    both.decode.next(Reserved, ticket.key)
    both.prefill.say(*[Prefill(ticket, the_work)] * 2)
    prefilled = both.prefill.next(Prefilled, ticket.key)
    assert prefilled.record is not None
    both.decode.say(*[Accept(ticket, prefilled.record, prefilled.first_token_id, WAIT_S)] * 2)
    assert len(rest(both.decode, ticket.key)) == 5
    both.prefill.say(*[Release(ticket)] * 2)
    first, second = (both.prefill.next(Released, ticket.key) for _ in range(2))
    assert first.transfer is not None
    assert second.transfer is None
    both.until_idle()
    assert both.prefill.events() == []
    assert not [event for event in both.decode.events() if isinstance(event, Reserved)]


@pytest.mark.parametrize("command", [Reserve, Prefill], ids=["reserve", "prefill"])
def test_a_later_attempt_takes_the_place_of_an_earlier_one(both: Both, command: type[Reserve] | type[Prefill]) -> None:
    router = both.decode if command is Reserve else both.prefill
    name = new_name()
    first, second = both.ticket(name, 1), both.ticket(name, 2)
    router.say(command(first, work(prompt_of(200))), command(second, work(prompt_of(30))))
    assert router.failure(first.key) == "stale_attempt"
    router.next(Reserved if command is Reserve else Prefilled, second.key)
    router.until_load(lambda load: (load.num_held, load.num_free_blocks) == (1, 62))
    router.say(command(first, work(prompt_of(30))))
    assert router.failure(first.key) == "stale_attempt"
    router.say(Release(second))
    router.next(Released, second.key)
    router.until_idle()


def test_a_later_attempt_forgets_parts_of_an_earlier_one(both: Both) -> None:
    name, prompt = new_name(), prompt_of(30)
    both.decode.say(
        PromptPart(both.ticket(name, 1), 0, prompt),
        Reserve(both.ticket(name, 2), work(prompt)),
        Reserve(both.ticket(name, 1), work(prompt, offset=20)),
    )
    both.decode.next(Reserved, (name, 2))
    assert both.decode.failure((name, 1)) == "stale_attempt"


def test_release_of_what_is_unknown_is_answered(both: Both) -> None:
    ticket = both.ticket()
    both.prefill.say(Release(ticket))
    both.decode.say(Cancel(ticket, "why"))
    assert both.prefill.next(Released) == both.decode.next(Released) == Released(ticket.key)


# ---- refusals


def test_a_reservation_without_room_is_refused(both: Both) -> None:
    big, small = both.ticket(), both.ticket()
    both.decode.say(Reserve(big, work(prompt_of(1000))), Reserve(small, work(prompt_of(20))))
    both.decode.next(Reserved, big.key)
    assert both.decode.next(Refused) == Refused(small.key, "no_room")
    both.decode.say(Cancel(big, "enough"), Reserve(small, work(prompt_of(20))))
    both.decode.next(Released, big.key)
    both.decode.next(Reserved, small.key)


@pytest.mark.parametrize("epoch", [0, 2])
def test_a_ticket_of_another_epoch_is_refused(both: Both, epoch: int) -> None:
    ticket = both.ticket(epoch=epoch)
    both.decode.say(Reserve(ticket, work(prompt_of(20))))
    both.prefill.say(Prefill(ticket, work(prompt_of(20))))
    assert both.decode.failure(ticket.key) == both.prefill.failure(ticket.key) == "pair_down"
    both.until_idle()


def test_a_worker_does_what_its_role_says_and_no_more(both: Both) -> None:
    there, back = both.ticket(), Ticket("r", 1, new_name(), "d", "p", 1)
    both.decode.say(Prefill(back, work(prompt_of(20))))
    assert both.decode.failure(back.key) == "wrong_role"
    both.prefill.say(Reserve(back, work(prompt_of(20))))
    assert both.prefill.failure(back.key) == "wrong_role"
    local = Ticket("r", 1, new_name(), "p", "p", 0)
    both.prefill.say(Prefill(local, work(prompt_of(20))))
    assert both.prefill.failure(local.key) == "wrong_role"
    both.decode.say(Reserve(there, work(prompt_of(20))))
    both.decode.next(Reserved, there.key)


# ---- cancel, in every state


def cancelled(router: Router, ticket: Ticket) -> None:
    router.say(Cancel(ticket, "the client is gone"))
    router.next(Released, ticket.key)
    router.until_idle()


def test_cancel_while_it_waits_to_be_prefilled(both: Both) -> None:
    hog, ticket = both.ticket(), both.ticket()
    both.prefill.say(Prefill(hog, work(prompt_of(1000))))
    both.prefill.next(Prefilled, hog.key)
    both.prefill.say(Prefill(ticket, work(prompt_of(200))))
    both.prefill.until_load(lambda load: load.num_waiting == 1)
    both.prefill.say(Cancel(ticket, "why"))
    both.prefill.next(Released, ticket.key)
    cancelled(both.prefill, hog)


def test_cancel_in_the_middle_of_its_prefill(both: Both) -> None:
    ticket, steps = both.ticket(), both.duo.prefill.steps
    steps.pause()
    both.prefill.say(Prefill(ticket, work(prompt_of(200))))
    assert steps.begun.get(timeout=WAIT_S).num_tokens == 64
    both.prefill.say(Cancel(ticket, "why"))
    steps.resume()
    both.prefill.next(Released, ticket.key)
    both.prefill.until_idle()


def test_cancel_after_its_prefill(both: Both) -> None:
    ticket = both.ticket()
    both.prefill.say(Prefill(ticket, work(prompt_of(100))))
    both.prefill.next(Prefilled, ticket.key)
    cancelled(both.prefill, ticket)


def test_cancel_of_a_reservation(both: Both) -> None:
    ticket = both.ticket()
    both.decode.say(Reserve(ticket, work(prompt_of(100))))
    both.decode.next(Reserved, ticket.key)
    cancelled(both.decode, ticket)


def test_cancel_while_kv_is_missing(both: Both) -> None:
    ticket, prompt = both.ticket(), prompt_of(20)
    layout = both.duo.decode.engine.layout
    segments = [Segment(layer, 0, layout.num_kv_heads, 0, len(prompt)) for layer in range(layout.num_layers)]
    record = CommitRecord(tuple(SegmentRecord(s, 1, 1) for s in segments), len(prompt), 0, prefix_hash(()))
    both.decode.say(Reserve(ticket, work(prompt)), Accept(ticket, record, 1, WAIT_S))
    both.decode.next(Reserved, ticket.key)
    cancelled(both.decode, ticket)


def test_cancel_while_it_writes(both: Both) -> None:
    ticket = both.ticket()
    begin(both.prefill, both.decode, ticket, work(prompt_of(20), 900))
    both.decode.wait_for_tokens(ticket.key)
    cancelled(both.decode, ticket)
    both.prefill.until_idle()


# ---- the end of a session


def test_the_end_of_a_session_ends_its_attempts_and_no_others(both: Both, duo: Duo) -> None:
    other = Both(duo, Router(duo.prefill), Router(duo.decode))
    kept = other.ticket()
    first = begin(other.prefill, other.decode, kept, work(prompt_of(10), 30))
    lost = [both.ticket() for _ in range(3)]
    begin(both.prefill, both.decode, lost[0], work(prompt_of(20), 900))
    both.decode.say(Reserve(lost[1], work(prompt_of(100))), PromptPart(lost[2], 0, prompt_of(5)))
    both.prefill.say(Prefill(lost[2], work(prompt_of(200))))
    both.decode.next(Reserved, lost[1].key)
    both.prefill.next(Prefilled, lost[2].key)
    both.prefill.hang_up()
    both.decode.hang_up()
    assert len([first, *rest(other.decode, kept.key)]) == 30
    other.until_idle()
    other.prefill.hang_up()
    other.decode.hang_up()


def test_a_straggler_of_a_session_that_ended_is_passed_over(both: Both, duo: Duo) -> None:
    router = Router(duo.decode)
    router.hang_up()
    router.say(Reserve(both.ticket(), work(prompt_of(100))))
    ticket = both.ticket()
    both.decode.say(Reserve(ticket, work(prompt_of(20))))
    both.decode.next(Reserved, ticket.key)
    assert both.decode.load is not None
    assert (both.decode.load.num_held, both.decode.load.num_free_blocks) == (1, 62)


def test_every_session_hears_of_the_pair(both: Both, duo: Duo) -> None:
    other = Router(duo.decode)
    both.decode.say(duo.connect)  # said again: only the outcome is repeated
    assert both.decode.next(PairUp) == other.next(PairUp) == PairUp("p", "d", 1, "shm")
    other.hang_up()
