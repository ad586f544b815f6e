"""The sending half over a real channel: what is committed is what was sent, and every end frees the blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from core.errors import TransferError
from core.messages import AttemptFailed, Prefilled, Released
from core.request import FinishReason, Request, RequestState
from core.sampling import SamplingParams
from core.ticket import prefix_hash
from kv_transfer.events import TransferFailed, TransferReady
from prefill_worker.half import PrefillHalf
from tests.halves import FIRST_TOKEN, LAYOUT, PLAN, PROMPT, WAIT_S, Pair, Side, kv, prefill, ticket, work

KEY = ("t", 1)


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


@pytest.fixture
def side(pair: Pair) -> Side:
    return pair.sender


@pytest.fixture
def peer(pair: Pair) -> Side:
    return pair.receiver


@pytest.fixture
def half(side: Side) -> PrefillHalf:
    return PrefillHalf(side.scheduler, side.plane.sender)


def step(side: Side, half: PrefillHalf) -> None:
    for output in side.step(half.push):
        assert half.publish(output)
    side.scheduler.check_integrity()


def run(side: Side, half: PrefillHalf) -> None:
    """Until nothing is left to compute."""
    while side.scheduler.num_running or side.scheduler.num_waiting:
        step(side, half)


def prefilled(side: Side) -> Prefilled:
    (event,) = side.taken()
    assert isinstance(event, Prefilled)
    return event


# ---- an undisturbed attempt


def test_the_record_covers_the_prompt(side: Side, half: PrefillHalf) -> None:
    half.start(prefill(), list(PROMPT), side.events.append)
    run(side, half)
    event = prefilled(side)
    assert (event.key, event.first_token_id, event.finish) == (KEY, FIRST_TOKEN, None)
    assert event.record is not None
    assert (event.record.num_tokens, event.record.num_skipped_tokens) == (len(PROMPT), 0)
    assert PLAN.gap(event.record) is None
    assert event.record.num_bytes == len(PROMPT) * LAYOUT.num_layers * LAYOUT.bytes_per_token_per_layer


def test_what_was_committed_arrives(side: Side, peer: Side, half: PrefillHalf) -> None:
    blocks = (7, 3, 5, 1)
    peer.plane.receiver.begin(ticket(), blocks, len(PROMPT))
    half.start(prefill(), list(PROMPT), side.events.append)
    run(side, half)
    record = prefilled(side).record
    assert record is not None
    peer.plane.receiver.accept(KEY, record, WAIT_S)
    told = peer.told.get(timeout=WAIT_S)
    assert isinstance(told, TransferReady)
    for layer in range(LAYOUT.num_layers):
        assert torch.equal(peer.storage.read(layer, blocks, 0, len(PROMPT)), kv(layer, PROMPT, 0))


def test_blocks_are_held_until_the_router_releases_them(side: Side, peer: Side, half: PrefillHalf) -> None:
    peer.plane.receiver.begin(ticket(), (7, 3, 5, 1), len(PROMPT))
    half.start(prefill(), list(PROMPT), side.events.append)
    run(side, half)
    record = prefilled(side).record
    assert record is not None
    assert (side.scheduler.num_held, side.pool.num_free_blocks) == (1, side.pool.num_blocks - 4)
    assert half.keys() == [KEY]
    peer.plane.receiver.accept(KEY, record, WAIT_S)
    peer.told.get(timeout=WAIT_S)  # so that all has left
    half.release(KEY)
    (released,) = side.taken()
    assert isinstance(released, Released)
    assert released.transfer is not None
    assert released.transfer.num_bytes == record.num_bytes
    assert min(released.transfer.exposed_s, released.transfer.transfer_s) >= 0
    side.assert_nothing_is_held()
    side.assert_forgot(KEY)


def test_a_prefix_that_is_there_already_is_not_sent(side: Side, half: PrefillHalf) -> None:
    half.start(prefill(num_skipped=5), list(PROMPT), side.events.append)
    run(side, half)
    record = prefilled(side).record
    assert record is not None
    assert (record.num_skipped_tokens, record.skipped_prefix_hash) == (5, prefix_hash(PROMPT[:5]))
    assert min(segment.segment.token_start for segment in record.segments) == 5
    assert PLAN.gap(record) is None


@pytest.mark.parametrize(
    ("the_work", "reason"),
    [(work(max_tokens=1), FinishReason.LENGTH), (work(stop_token_ids=(FIRST_TOKEN,)), FinishReason.STOP)],
    ids=["length", "stop"],
)
def test_a_first_token_that_is_the_last_leaves_nothing(
    side: Side, half: PrefillHalf, the_work: object, reason: FinishReason
) -> None:
    half.start(prefill(the_work=the_work), list(PROMPT), side.events.append)  # type: ignore[arg-type]
    run(side, half)
    assert side.taken() == [Prefilled(KEY, FIRST_TOKEN, reason, None)]
    assert KEY not in half
    side.assert_nothing_is_held()
    side.assert_forgot(KEY)


def test_a_resumed_prompt_counts_what_was_streamed_before(side: Side, half: PrefillHalf) -> None:
    """13 tokens, 3 of them streamed: the fourth output token is the last of four."""
    half.start(prefill(the_work=work(max_tokens=4, num_streamed=3)), list(PROMPT), side.events.append)
    run(side, half)
    assert side.taken() == [Prefilled(KEY, FIRST_TOKEN, FinishReason.LENGTH, None)]


def test_attempts_of_one_step_are_committed_each(side: Side, half: PrefillHalf) -> None:
    for name, length in (("a", 3), ("b", 5)):
        half.start(prefill(name), list(PROMPT[:length]), side.events.append)
    step(side, half)
    events = [event for event in side.taken() if isinstance(event, Prefilled) and event.record]
    assert [(e.key, e.record and e.record.num_tokens) for e in events] == [(("a", 1), 3), (("b", 1), 5)]


def test_requests_of_others_are_not_sent_and_not_published(side: Side, half: PrefillHalf) -> None:
    side.scheduler.add(Request("other", list(PROMPT[:4]), SamplingParams(max_tokens=2)))
    (output,) = side.step(half.push)
    assert not half.publish(output)
    assert side.taken() == []


# ---- attempts that do not begin


@pytest.mark.parametrize("epoch", [0, 2], ids=["past epoch", "epoch to come"])
def test_without_the_channel_of_its_epoch_nothing_begins(side: Side, half: PrefillHalf, epoch: int) -> None:
    command = prefill()
    elsewhere = ticket(epoch=epoch)
    with pytest.raises(TransferError) as caught:
        half.start(type(command)(elsewhere, command.work), list(PROMPT), side.events.append)
    assert caught.value.reason == "pair_down"
    assert KEY not in half
    side.assert_nothing_is_held()


def test_an_attempt_older_than_one_that_is_held_does_not_begin(side: Side, half: PrefillHalf) -> None:
    half.start(prefill(attempt=2), list(PROMPT), side.events.append)
    with pytest.raises(TransferError) as caught:
        half.start(prefill(attempt=1), list(PROMPT), side.events.append)
    assert caught.value.reason == "stale_attempt"
    assert half.keys() == [("t", 2)]
    half.drop(("t", 2))
    side.assert_nothing_is_held()


# ---- every end, in every state

BEFORE: dict[str, Callable[[Side, PrefillHalf], None]] = {
    "waiting": lambda side, half: None,
    "prefilling": step,
    "committed": run,
}


@pytest.fixture(params=BEFORE)
def begun(request: pytest.FixtureRequest, side: Side, half: PrefillHalf) -> None:
    """An attempt in each of the states that it can be in."""
    half.start(prefill(), list(PROMPT), side.events.append)
    BEFORE[request.param](side, half)
    side.taken()


@pytest.mark.usefixtures("begun")
def test_a_failed_attempt_says_so_once_and_holds_nothing(side: Side, half: PrefillHalf) -> None:
    for _ in range(2):
        half.fail(KEY, "lease_expired", "words")
    assert side.taken() == [AttemptFailed(KEY, "lease_expired", "words")]
    assert KEY not in half
    side.assert_nothing_is_held()
    side.assert_forgot(KEY)


@pytest.mark.usefixtures("begun")
def test_a_released_attempt_says_so_once_and_holds_nothing(side: Side, half: PrefillHalf) -> None:
    for _ in range(2):
        half.release(KEY)
    (released,) = side.taken()
    assert isinstance(released, Released)
    assert released.key == KEY
    side.assert_nothing_is_held()
    side.assert_forgot(KEY)


@pytest.mark.usefixtures("begun")
def test_a_dropped_attempt_says_nothing_and_holds_nothing(side: Side, half: PrefillHalf) -> None:
    for _ in range(2):
        half.drop(KEY)
    assert side.taken() == []
    assert KEY not in half
    side.assert_nothing_is_held()
    side.assert_forgot(KEY)


@pytest.mark.usefixtures("begun")
def test_the_next_attempt_begins_where_one_has_ended(side: Side, half: PrefillHalf) -> None:
    half.drop(KEY)
    half.start(prefill(attempt=2), list(PROMPT), side.events.append)
    run(side, half)
    assert prefilled(side).key == ("t", 2)


def test_an_attempt_that_ends_in_a_step_is_not_published(side: Side, half: PrefillHalf) -> None:
    half.start(prefill(), list(PROMPT[:5]), side.events.append)
    ended: list[int] = []

    def end(plan: object, layer: int) -> None:
        if not ended:
            half.release(KEY)
        ended.append(layer)

    assert side.step(end) == []
    assert ended == [0, 1]
    assert side.taken() == [Released(KEY, None)]
    side.assert_nothing_is_held()


# ---- transfers that fail


def test_a_transfer_cancelled_from_another_thread_is_not_committed(side: Side, half: PrefillHalf) -> None:
    half.start(prefill(), list(PROMPT), side.events.append)
    step(side, half)
    side.plane.cancel(KEY)
    run(side, half)
    (failed,) = side.taken()
    assert isinstance(failed, AttemptFailed)
    side.assert_nothing_is_held()


def test_a_transfer_whose_channel_broke_is_not_committed(side: Side, half: PrefillHalf) -> None:
    half.start(prefill(), list(PROMPT), side.events.append)
    step(side, half)
    side.plane.on_pair_down(("p", "d"), 1, "gone")  # as the channel's thread says it
    assert side.told.get(timeout=WAIT_S) == TransferFailed(KEY, "pair_down", "gone")
    run(side, half)
    (failed,) = side.taken()
    assert isinstance(failed, AttemptFailed)
    assert failed.reason == "pair_down"
    side.assert_nothing_is_held()


def test_prefilled_requests_are_held_not_decoded(side: Side, half: PrefillHalf) -> None:
    half.start(prefill(), list(PROMPT), side.events.append)
    run(side, half)
    (request,) = side.scheduler.requests.values()
    assert (request.state, request.output_token_ids) == (RequestState.HELD, [FIRST_TOKEN])
    assert side.step(half.push) == []
