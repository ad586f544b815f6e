"""Who is let into the queue, and the advice given to those who are not."""

from __future__ import annotations

import pytest

from core.errors import OverloadedError
from core.request import Request
from core.sampling import SamplingParams
from router.admission import TENANT_MEMORY_S, Door, DrainRate, RetryAdvice
from router.config import DispatchConfig
from router.fair_queue import Claim, FairQueue
from router.ledger import Entry
from router.policies.fleet import Fleet
from router.stream import RequestStream


def entry(seq: int) -> Entry:
    stream = RequestStream(str(seq), max_buffered_tokens=1, on_cancel=lambda: None, on_stop=lambda: None)
    return Entry(Request(str(seq), [1], SamplingParams(max_tokens=1)), stream, seq, f"t{seq}", arrived_s=0.0)


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


# ---- the pace at which the queue empties


def test_the_pace_is_cost_a_second_while_somebody_waits() -> None:
    drain = DrainRate()
    drain.on_length(1, 0.0)
    for second in range(1, 9):
        drain.on_served(3.0, float(second))
    assert drain.rate(8.0) == 3.0
    assert drain.rate(16.0) == 1.5  # nothing was served since: it has become slower


def test_nothing_is_said_of_a_pace_that_was_hardly_seen() -> None:
    drain = DrainRate()
    drain.on_length(1, 0.0)
    drain.on_served(1.0, 1.0)
    assert drain.rate(2.0) is None


def test_what_is_served_without_a_queue_tells_nothing_of_the_pace() -> None:
    drain = DrainRate()
    drain.on_length(1, 0.0)
    for second in range(1, 9):
        drain.on_served(3.0, float(second))
    drain.on_length(0, 8.0)
    for second in range(100, 200):
        drain.on_served(0.001, float(second))
    assert drain.rate(200.0) == 3.0


# ---- the door


def door(*, max_queue_len: int = 9, max_queued_tokens: int = 1000) -> tuple[Door, FairQueue]:
    queue = FairQueue({})
    config = DispatchConfig(max_queue_len=max_queue_len, max_queued_tokens=max_queued_tokens)
    return Door(config, queue, RetryAdvice(), Fleet()), queue


def fill(queue: FairQueue, count: int, tenant: str = "", num_tokens: int = 1) -> None:
    last = max((each.seq for each in queue), default=0)
    for i in range(count):
        queue.push(entry(last + 1 + i), Claim(tenant, 1.0, 0.0, num_tokens))


def test_one_tenant_alone_may_have_the_whole_queue() -> None:
    at, queue = door()
    fill(queue, 8, "one")
    at.check_room(Claim("one", 1.0, 0.0, 1), 0.0)
    fill(queue, 1, "one")
    with pytest.raises(OverloadedError, match="9 requests wait"):
        at.check_room(Claim("one", 1.0, 0.0, 1), 0.0)


def test_while_others_ask_room_is_left_for_them() -> None:
    at, queue = door()
    at.check_room(Claim("other", 1.0, 0.0, 1), 0.0)
    fill(queue, 6, "greedy")
    with pytest.raises(OverloadedError, match="this tenant's share"):
        at.check_room(Claim("greedy", 1.0, 0.0, 1), 1.0)
    at.check_room(Claim("other", 1.0, 0.0, 1), 1.0)
    at.check_room(Claim("greedy", 1.0, 0.0, 1), 2.0 + TENANT_MEMORY_S)  # nobody else has asked for long


def test_tokens_that_wait_are_bounded_but_a_prompt_alone_is_let_in() -> None:
    at, queue = door(max_queued_tokens=100)
    at.check_room(Claim("", 1.0, 0.0, 5000), 0.0)
    fill(queue, 1, num_tokens=60)
    at.check_room(Claim("", 1.0, 0.0, 40), 0.0)
    with pytest.raises(OverloadedError, match="60 tokens wait"):
        at.check_room(Claim("", 1.0, 0.0, 41), 0.0)


def test_who_would_come_too_late_is_refused_and_who_comes_back_when_told_is_let_in() -> None:
    """Requests of a second each are served one a second; four seconds are promised."""
    at, queue = door(max_queue_len=100)
    fill(queue, 6)
    at.drain.on_length(6, 0.0)
    claim, now_s = Claim("", 1.0, 0.0, 1), 0.0
    told: list[float] = []
    for second in range(1, 60):
        now_s = float(second)
        served = queue.first()
        if served is not None:
            at.drain.on_served(queue.serve(served), now_s)
        for _ in range(5 if 5 < second < 30 else 0):  # five times what can be served
            try:
                at.check_slo(claim, 0.5, 4.0, now_s)
            except OverloadedError as error:
                told.append(now_s + error.retry_after_s)
            else:
                fill(queue, 1)
        assert len(queue) <= 6  # no more are let in than are served in time
        at.drain.on_length(len(queue), now_s)
    assert told
    at.check_slo(claim, 0.5, 4.0, max(now_s, *told))


def test_a_worker_too_slow_for_the_target_is_no_promise() -> None:
    at, _ = door()
    with pytest.raises(OverloadedError, match="after about 5 s, 4 s are promised") as caught:
        at.check_slo(Claim("", 1.0, 0.0, 1), 5.0, 4.0, 0.0)
    assert caught.value.retry_after_s >= 1.0
