"""The queue's order, and the advice given when it is full."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from core.request import Request
from core.sampling import SamplingParams
from router.admission import RetryAdvice, WaitingQueue
from router.ledger import Entry
from router.stream import RequestStream


def entry(seq: int) -> Entry:
    stream = RequestStream(str(seq), max_buffered_tokens=1, on_cancel=lambda: None, on_stop=lambda: None)
    return Entry(Request(str(seq), [1], SamplingParams(max_tokens=1)), stream, seq, f"t{seq}", arrived_s=0.0)


@given(st.lists(st.integers(0, 20), unique=True), st.data())
def test_the_queue_is_in_order_of_arrival_whatever_comes_back(seqs: list[int], data: st.DataObject) -> None:
    queue, entries = WaitingQueue(), {seq: entry(seq) for seq in seqs}
    for seq in seqs:
        queue.push(entries[seq])
    gone = data.draw(st.sets(st.sampled_from(seqs))) if seqs else set()
    for seq in gone:
        assert queue.remove(entries[seq])
        assert not queue.remove(entries[seq])
    back = data.draw(st.sets(st.sampled_from(sorted(gone)))) if gone else set()
    for seq in back:
        queue.push(entries[seq])
    assert [e.seq for e in queue] == sorted(set(seqs) - gone | back)
    assert len(queue) == len(seqs) - len(gone) + len(back)


def test_a_namesake_is_not_removed() -> None:
    queue = WaitingQueue()
    queue.push(entry(3))
    assert not queue.remove(entry(3))


def test_advice_is_the_pace_at_which_requests_end() -> None:
    advice = RetryAdvice()
    for second in range(10):
        advice.on_end(float(second))
    assert advice.retry_after_s(10.0) == 1.0


def test_each_one_turned_away_is_sent_behind_the_last() -> None:
    advice = RetryAdvice()
    for second in range(10):
        advice.on_end(float(second))
    assert [advice.retry_after_s(10.0) for _ in range(3)] == [1.0, 2.0, 3.0]
    advice.on_end(10.0)
    advice.on_end(10.0)
    assert 1.0 < advice.retry_after_s(11.0) < 2.0


def test_advice_without_experience_and_its_limits() -> None:
    advice = RetryAdvice(unknown_s=5.0, min_s=0.1, max_s=60.0)
    assert advice.retry_after_s(0.0) == 5.0
    for _ in range(100):
        advice.on_end(100.0)
    assert advice.retry_after_s(100.001) == 0.1
    assert [advice.retry_after_s(160.0) for _ in range(200)][-1] == 60.0


def test_what_happened_long_ago_is_no_experience() -> None:
    advice = RetryAdvice(unknown_s=5.0, max_s=60.0)
    advice.on_end(0.0)
    assert advice.retry_after_s(61.0) == 5.0
