"""The receiving half over a real channel: nothing joins before its KV is there, and every end frees the blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from core.errors import TransferError
from core.messages import (
    Accepted,
    AttemptFailed,
    Prefill,
    Prefilled,
    Refused,
    Released,
    Reserve,
    Reserved,
    SequenceTokens,
    StepTokens,
)
from core.request import FinishReason, Request, RequestState
from core.sampling import SamplingParams
from core.ticket import CommitRecord
from decode_worker.half import DecodeHalf
from engine.plan import Plan
from kv_transfer.events import TransferFailed, TransferReady
from tests.halves import (
    FIRST_TOKEN,
    LAYOUT,
    MAX_SEQS,
    NUM_BLOCKS,
    PLAN,
    PROMPT,
    WAIT_S,
    Pair,
    Side,
    accept,
    kv,
    reserve,
    ticket,
    work,
)

KEY = ("t", 1)


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


@pytest.fixture
def side(pair: Pair) -> Side:
    return pair.receiver


@pytest.fixture
def peer(pair: Pair) -> Side:
    return pair.sender


@pytest.fixture
def half(side: Side) -> DecodeHalf:
    return DecodeHalf(side.scheduler, side.pool, side.plane.receiver)


def send(peer: Side, name: str = "t", attempt: int = 1, prompt: tuple[int, ...] = PROMPT) -> CommitRecord:
    """Prefill elsewhere, and send what was computed."""
    peer.scheduler.add(Request(name, list(prompt), SamplingParams(max_tokens=9)), prefill_only=True)
    peer.plane.sender.begin(ticket(name, attempt))

    def push(plan: Plan, layer: int) -> None:
        for entry in plan.entries:
            peer.plane.sender.push((name, attempt), layer, entry.start, entry.end, entry.block_ids)

    while peer.scheduler.num_waiting or peer.scheduler.num_running:
        peer.step(push)
    peer.scheduler.release(name)
    return peer.plane.sender.commit((name, attempt), prompt)


def join(side: Side, half: DecodeHalf) -> None:
    """What the worker does when the receiver says that all is there."""
    ready = side.told.get(timeout=WAIT_S)
    assert isinstance(ready, TransferReady)
    half.join(ready.key, ready.commit_wait_s)
    side.scheduler.check_integrity()


def step(side: Side, half: DecodeHalf) -> None:
    half.publish(side.step())
    side.scheduler.check_integrity()


def tokens(side: Side) -> list[tuple[int, ...]]:
    """Those of the one sequence in the events so far, a tuple for each event."""
    found = []
    for event in side.taken():
        assert isinstance(event, StepTokens)
        (sequence,) = event.sequences
        found.append(sequence.token_ids)
    return found


# ---- reservation


def test_a_reservation_holds_blocks_for_the_prompt_and_one_token(side: Side, half: DecodeHalf) -> None:
    half.reserve(reserve(the_work=work(PROMPT[:8])), list(PROMPT[:8]), side.events.append)
    assert side.taken() == [Reserved(KEY)]
    assert half.keys() == [KEY]
    assert (side.scheduler.num_held, side.pool.num_free_blocks) == (1, NUM_BLOCKS - 3)
    assert side.step() == []


def test_without_blocks_it_is_refused_and_holds_nothing(side: Side, half: DecodeHalf) -> None:
    prompt = [7] * (NUM_BLOCKS * 4 - 8)
    half.reserve(reserve("big", the_work=work(prompt)), prompt, side.events.append)
    half.reserve(reserve(), list(PROMPT), side.events.append)
    assert side.taken() == [Reserved(("big", 1)), Refused(KEY, "no_room")]
    assert half.keys() == [("big", 1)]
    side.assert_forgot(KEY)
    half.drop(("big", 1))
    side.assert_nothing_is_held()
    half.reserve(reserve(), list(PROMPT), side.events.append)  # the same again, now that there is room
    assert side.taken() == [Reserved(KEY)]


def test_without_a_free_sequence_it_is_refused(side: Side, half: DecodeHalf) -> None:
    for i in range(MAX_SEQS + 1):
        half.reserve(reserve(str(i)), [1, 2, 3], side.events.append)
    assert side.taken()[-1] == Refused((str(MAX_SEQS), 1), "no_room")
    assert len(half.keys()) == side.scheduler.num_held == MAX_SEQS


def test_without_a_channel_nothing_is_held(side: Side, half: DecodeHalf) -> None:
    with pytest.raises(TransferError) as caught:
        half.reserve(Reserve(ticket(epoch=2), work()), list(PROMPT), side.events.append)
    assert caught.value.reason == "pair_down"
    assert side.taken() == []
    assert KEY not in half
    side.assert_nothing_is_held()


def test_an_attempt_older_than_one_that_is_held_does_not_begin(side: Side, half: DecodeHalf) -> None:
    half.reserve(reserve(attempt=2), list(PROMPT), side.events.append)
    with pytest.raises(TransferError) as caught:
        half.reserve(reserve(attempt=1), list(PROMPT), side.events.append)
    assert caught.value.reason == "stale_attempt"
    assert half.keys() == [("t", 2)]
    half.drop(("t", 2))
    side.assert_nothing_is_held()


# ---- an undisturbed attempt


def test_it_joins_once_everything_is_there(side: Side, peer: Side, half: DecodeHalf) -> None:
    half.reserve(reserve(), list(PROMPT), side.events.append)
    half.accept(accept(send(peer)))
    join(side, half)
    reserved, accepted = side.taken()
    assert reserved == Reserved(KEY)
    assert isinstance(accepted, Accepted)
    assert (accepted.key, accepted.commit_wait_s >= 0) == (KEY, True)
    (request,) = side.scheduler.requests.values()
    assert (request.state, request.output_token_ids) == (RequestState.RUNNING, [FIRST_TOKEN])
    for layer in range(LAYOUT.num_layers):
        came = side.storage.read(layer, side.pool.table(request.request_id), 0, len(PROMPT))
        assert torch.equal(came, kv(layer, PROMPT, 0))


def test_the_router_s_first_token_goes_on_to_the_last(side: Side, peer: Side, half: DecodeHalf) -> None:
    half.reserve(reserve(), list(PROMPT), side.events.append)
    half.accept(accept(send(peer)))
    join(side, half)
    side.taken()
    for _ in range(3):
        step(side, half)
    sequences = [event.sequences[0] for event in side.taken() if isinstance(event, StepTokens)]
    assert sequences == [
        SequenceTokens(KEY, (FIRST_TOKEN + 1,)),
        SequenceTokens(KEY, (FIRST_TOKEN + 2,)),
        SequenceTokens(KEY, (FIRST_TOKEN + 3,), FinishReason.LENGTH),
    ]
    assert KEY not in half
    side.assert_nothing_is_held()
    side.assert_forgot(KEY)


def test_nothing_joins_before_it_is_accepted(side: Side, peer: Side, half: DecodeHalf) -> None:
    half.reserve(reserve(), list(PROMPT), side.events.append)
    side.taken()
    half.join(KEY, 0.0)
    half.join(("unknown", 1), 0.0)
    assert side.taken() == []
    assert (side.scheduler.num_running, side.scheduler.num_held) == (0, 1)


def test_accept_said_twice_joins_once(side: Side, peer: Side, half: DecodeHalf) -> None:
    half.reserve(reserve(), list(PROMPT), side.events.append)
    command = accept(send(peer))
    half.accept(command)
    half.accept(replace(command, first_token_id=FIRST_TOKEN + 50))
    join(side, half)
    half.accept(command)
    (request,) = side.scheduler.requests.values()
    assert request.output_token_ids == [FIRST_TOKEN]
    assert side.told.empty()


def test_accept_of_what_is_unknown_is_passed_over(side: Side, half: DecodeHalf) -> None:
    half.accept(accept(CommitRecord((), 3), "unknown"))
    assert side.taken() == []
    assert side.told.empty()


def test_a_record_that_is_not_of_the_prompt_fails(side: Side, peer: Side, half: DecodeHalf) -> None:
    half.reserve(reserve(), list(PROMPT), side.events.append)
    half.accept(accept(replace(send(peer), num_tokens=5)))
    told = side.told.get(timeout=WAIT_S)
    assert isinstance(told, TransferFailed)
    assert (told.key, told.reason) == (KEY, "record_mismatch")
    half.fail(told.key, told.reason, told.message)
    assert side.taken()[1:] == [AttemptFailed(KEY, "record_mismatch", told.message)]
    side.assert_nothing_is_held()


def test_a_token_that_ends_the_request_on_this_side_leaves_nothing(side: Side, peer: Side, half: DecodeHalf) -> None:
    """The prefill side may allow a longer sequence than this one."""
    half.reserve(reserve(the_work=work(max_tokens=1)), list(PROMPT), side.events.append)
    half.accept(accept(send(peer)))
    join(side, half)
    assert side.taken()[2:] == [StepTokens((SequenceTokens(KEY, (), FinishReason.LENGTH),))]
    assert KEY not in half
    side.assert_nothing_is_held()


def test_a_step_is_one_event_for_each_router(side: Side, peer: Side, half: DecodeHalf) -> None:
    north: list[object] = []
    south: list[object] = []
    for name, emit in (("a", north.append), ("b", south.append), ("c", north.append)):
        half.reserve(reserve(name), list(PROMPT), emit)
        half.accept(accept(send(peer, name), name))
        join(side, half)
    north.clear()
    south.clear()
    step(side, half)
    token = (FIRST_TOKEN + 1,)
    assert north == [StepTokens((SequenceTokens(("a", 1), token), SequenceTokens(("c", 1), token)))]
    assert south == [StepTokens((SequenceTokens(("b", 1), token),))]


def test_a_preempted_request_goes_on_without_a_gap(side: Side, peer: Side, half: DecodeHalf) -> None:
    """It computes all its tokens anew, and the router sees nothing of that."""
    half.reserve(reserve(the_work=work(max_tokens=8)), list(PROMPT), side.events.append)
    half.accept(accept(send(peer)))
    join(side, half)
    step(side, half)
    side.taken()
    crowd = SamplingParams(max_tokens=5)
    side.scheduler.reserve(Request("crowd", [1] * (4 * side.pool.num_free_blocks - 1), crowd))
    assert side.pool.num_free_blocks == 0
    while not side.scheduler.num_preemptions:
        step(side, half)
    assert side.scheduler.num_waiting == 1
    side.scheduler.release("crowd")
    while half.keys():
        step(side, half)
    assert tokens(side) == [(FIRST_TOKEN + i,) for i in range(2, 8)]
    side.assert_nothing_is_held()


# ---- local attempts


def start_local(side: Side, half: DecodeHalf, max_tokens: int = 3) -> None:
    local = ticket(prefill="d", decode="d")
    half.start_local(Prefill(local, work(max_tokens=max_tokens)), list(PROMPT), side.events.append)


def test_a_local_request_is_prefilled_and_decoded_here(side: Side, half: DecodeHalf) -> None:
    start_local(side, half)
    while half.keys():
        step(side, half)
    assert side.taken() == [
        Prefilled(KEY, FIRST_TOKEN, None, None),
        StepTokens((SequenceTokens(KEY, (FIRST_TOKEN + 1,)),)),
        StepTokens((SequenceTokens(KEY, (FIRST_TOKEN + 2,), FinishReason.LENGTH),)),
    ]
    side.assert_nothing_is_held()
    side.assert_forgot(KEY)


def test_a_local_first_token_that_is_the_last_leaves_nothing(side: Side, half: DecodeHalf) -> None:
    start_local(side, half, max_tokens=1)
    while half.keys():
        step(side, half)
    assert side.taken() == [Prefilled(KEY, FIRST_TOKEN, FinishReason.LENGTH, None)]
    side.assert_nothing_is_held()


def test_outputs_of_nobody_s_request_are_passed_over(side: Side, half: DecodeHalf) -> None:
    side.scheduler.add(Request("other", [1, 2, 3], SamplingParams(max_tokens=2)))
    step(side, half)
    assert side.taken() == []


# ---- every end, in every state


def reserved(side: Side, peer: Side, half: DecodeHalf) -> None:
    half.reserve(reserve(), list(PROMPT), side.events.append)


def accepted(side: Side, peer: Side, half: DecodeHalf) -> None:
    """The record is known, one segment of it is still to come."""
    reserved(side, peer, half)
    record = send(peer, prompt=PROMPT[:8])
    missing = [replace(r, segment=replace(r.segment, token_start=8, token_end=13)) for r in record.segments]
    whole = CommitRecord((*record.segments, *missing), len(PROMPT), 0, record.skipped_prefix_hash)
    assert PLAN.gap(whole) is None
    half.accept(accept(whole))


def running(side: Side, peer: Side, half: DecodeHalf) -> None:
    reserved(side, peer, half)
    half.accept(accept(send(peer)))
    join(side, half)
    step(side, half)


def local_waiting(side: Side, peer: Side, half: DecodeHalf) -> None:
    start_local(side, half)


def local_running(side: Side, peer: Side, half: DecodeHalf) -> None:
    start_local(side, half)
    step(side, half)


STATES: list[Callable[[Side, Side, DecodeHalf], None]] = [reserved, accepted, running, local_waiting, local_running]


@pytest.fixture(params=STATES, ids=[state.__name__ for state in STATES])
def begun(request: pytest.FixtureRequest, side: Side, peer: Side, half: DecodeHalf) -> None:
    """An attempt in each of the states that it can be in."""
    request.param(side, peer, half)
    assert half.keys() == [KEY]
    side.taken()


@pytest.mark.usefixtures("begun")
def test_a_failed_attempt_says_so_once_and_holds_nothing(side: Side, half: DecodeHalf) -> None:
    for _ in range(2):
        half.fail(KEY, "lease_expired", "words")
    assert side.taken() == [AttemptFailed(KEY, "lease_expired", "words")]
    assert KEY not in half
    side.assert_nothing_is_held()
    side.assert_forgot(KEY)


@pytest.mark.usefixtures("begun")
def test_a_released_attempt_says_so_once_and_holds_nothing(side: Side, half: DecodeHalf) -> None:
    for _ in range(2):
        half.release(KEY)
    assert side.taken() == [Released(KEY)]
    side.assert_nothing_is_held()
    side.assert_forgot(KEY)


@pytest.mark.usefixtures("begun")
def test_a_dropped_attempt_says_nothing_and_holds_nothing(side: Side, half: DecodeHalf) -> None:
    for _ in range(2):
        half.drop(KEY)
    assert side.taken() == []
    assert KEY not in half
    side.assert_nothing_is_held()
    side.assert_forgot(KEY)


def test_segments_that_come_late_touch_no_block(side: Side, peer: Side, half: DecodeHalf) -> None:
    half.reserve(reserve(), list(PROMPT), side.events.append)
    half.drop(KEY)
    half.reserve(reserve("next"), list(PROMPT), side.events.append)  # into the very same blocks
    num_discarded = side.plane.receiver.num_discarded_segments
    send(peer)
    record = send(peer, "next", prompt=tuple(token + 500 for token in PROMPT))
    half.accept(accept(record, "next"))
    join(side, half)  # what was sent before is through by now
    assert side.plane.receiver.num_discarded_segments == num_discarded + len(record.segments)
    (request,) = side.scheduler.requests.values()
    for layer in range(LAYOUT.num_layers):
        came = side.storage.read(layer, side.pool.table(request.request_id), 0, len(PROMPT))
        assert torch.equal(came, kv(layer, [token + 500 for token in PROMPT], 0))


def test_an_attempt_that_ends_before_it_is_ready_does_not_join(side: Side, peer: Side, half: DecodeHalf) -> None:
    half.reserve(reserve(), list(PROMPT), side.events.append)
    half.accept(accept(send(peer)))
    ready = side.told.get(timeout=WAIT_S)
    assert isinstance(ready, TransferReady)
    half.release(KEY)
    half.join(ready.key, ready.commit_wait_s)
    assert side.taken() == [Reserved(KEY), Released(KEY)]
    side.assert_nothing_is_held()
