"""Retries: from where the last attempt ended, on whatever server, never longer than the caller waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import pytest

from penstock import InternalError, OverloadedError, PenstockError, UnavailableError
from penstock.retry import RetryPolicy
from penstock.status import ErrorDetails, pack_details
from tests.client.conftest import Connect, Sdk
from tests.client.fake_server import FakeServer, Script, delta, finished, refuses, says, started, streams


def full(retry_after_s: float | None = None) -> Script:
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    return refuses(code, "full", pack_details(code, "full", ErrorDetails(retry_after_s=retry_after_s)))


def down(after: tuple[Any, ...] = ()) -> Script:
    return refuses(grpc.StatusCode.UNAVAILABLE, "no worker", after=after)


class Patience:
    """Stands in for `sleep` and keeps what was asked of it."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self.slept_s: list[float] = []
        self.wake: Callable[[], None] = lambda: None

    def __call__(self, delay_s: float) -> None:
        self.slept_s.append(delay_s)
        self.wake()

    def connect(self, **options: Any) -> Sdk:
        return self._connect(random=lambda: 0.0, sleep=self, **options)


@pytest.fixture
def patience(connect: Connect) -> Patience:
    return Patience(connect)


def test_refusal_is_tried_again_after_what_the_server_asked_for(patience: Patience, server: FakeServer) -> None:
    server.play(full(30), full(), says("a"))
    sdk = patience.connect()
    assert sdk.text(sdk.generate()) == "a"
    assert patience.slept_s == [30 + 0.25, 0.5]
    assert server.requests[0] == server.requests[1] == server.requests[2]


def test_no_server_is_tried_again_until_there_is_one(patience: Patience, server: FakeServer) -> None:
    server.play(down(), says("a"))
    sdk = patience.connect()
    assert sdk.text(sdk.generate()) == "a"


def test_what_came_before_a_retry_is_forgotten(patience: Patience, server: FakeServer) -> None:
    server.play(refuses(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", after=(started("req-1"),)), down(), says("a"))
    sdk = patience.connect()
    generation = sdk.generate()
    assert [str(delta) for delta in sdk.read_all(generation)] == ["a"]
    assert generation.token_ids == (0,)


@pytest.mark.parametrize("max_retries", [0, 1, 3])
def test_retries_end_and_the_last_error_counts(patience: Patience, server: FakeServer, max_retries: int) -> None:
    server.play(*[down()] * max_retries, full(1.5))
    sdk = patience.connect(max_retries=max_retries)
    with pytest.raises(OverloadedError) as caught:
        sdk.text(sdk.generate())
    assert caught.value.retry_after_s == 1.5
    assert len(patience.slept_s) == max_retries


@pytest.mark.parametrize("code", ["INVALID_ARGUMENT", "NOT_FOUND", "INTERNAL", "CANCELLED", "DEADLINE_EXCEEDED"])
def test_other_errors_are_final(patience: Patience, server: FakeServer, code: str) -> None:
    server.play(refuses(grpc.StatusCode[code], "no"))
    sdk = patience.connect()
    with pytest.raises(PenstockError):
        sdk.text(sdk.generate())
    assert len(server.requests) == 1


def test_a_refusal_is_final_once_a_token_has_come(patience: Patience, server: FakeServer) -> None:
    server.play(refuses(grpc.StatusCode.RESOURCE_EXHAUSTED, "no", after=(started(), delta("a", 1))))
    sdk = patience.connect()
    with pytest.raises(PenstockError, match="1 tokens had come"):
        sdk.text(sdk.generate())
    assert len(server.requests) == 1


def test_a_lost_server_is_asked_to_go_on_behind_what_has_come(patience: Patience, server: FakeServer) -> None:
    first, second = down(after=(started("r", 99), delta("a\u00e9", 1), delta("", 2))), down(after=(started("r", 99),))
    server.play(first, second, streams(started("r", 99), delta("b", 3), finished(3)))
    sdk = patience.connect()
    generation = sdk.generate("hi", temperature=1.0)
    assert sdk.text(generation) == "a\u00e9b"
    assert generation.token_ids == (1, 2, 3)
    assert generation.usage is not None
    assert generation.usage.num_output_tokens == 3
    sent, *again = server.requests
    assert not sent.HasField("resume")
    for request in again:
        assert (request.request_id, request.sampling.seed) == ("r", 99)
        assert (list(request.resume.token_ids), request.resume.num_characters) == ([1, 2], 2)
        assert (request.prompt, request.sampling.temperature) == ("hi", 1.0)


def test_a_server_that_was_lost_before_it_answered_may_take_the_request_over(
    patience: Patience, server: FakeServer
) -> None:
    server.play(down(), says("a"))
    sdk = patience.connect()
    sdk.text(sdk.generate(request_id="mine"))
    assert [request.request_id for request in server.requests] == ["mine", "mine"]
    assert [request.HasField("resume") for request in server.requests] == [False, True]


def test_the_next_of_several_servers_goes_on_and_is_asked_first_from_then_on(
    patience: Patience, server: FakeServer
) -> None:
    first = FakeServer()
    first.play(down(after=(started("r", 99), delta("a", 1))))
    server.play(streams(started("r", 99), delta("b", 2), finished(2)), says("c"))
    sdk = patience.connect(target=[first.target, server.target])
    try:
        assert sdk.text(sdk.generate()) == "ab"
        assert sdk.text(sdk.generate()) == "c"
    finally:
        first.stop()
    assert (len(first.requests), len(server.requests)) == (1, 2)


def test_a_server_that_can_not_be_reached_is_not_asked_again_where_there_is_another(
    patience: Patience, server: FakeServer
) -> None:
    sdk = patience.connect(target=["127.0.0.1:1", server.target])
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1 is unavailable"):
        sdk.call("server_info")
    sdk.call("server_info")


def test_no_retry_that_would_begin_after_the_deadline(patience: Patience, server: FakeServer) -> None:
    server.play(full(20))
    sdk = patience.connect()
    with pytest.raises(OverloadedError):
        sdk.text(sdk.generate(timeout_s=10))
    assert patience.slept_s == []


def test_retries_share_one_deadline(patience: Patience, server: FakeServer) -> None:
    now = [100.0]
    server.play(full(30), says("a"))
    sdk = patience.connect(clock=lambda: now[0])
    patience.wake = lambda: now.__setitem__(0, 140.0)
    sdk.text(sdk.generate(timeout_s=60))
    first_s, second_s = server.remaining_s
    assert first_s is not None
    assert 50 < first_s < 65
    assert second_s is not None
    assert 10 < second_s < 25


def test_a_generation_closed_while_it_waits_to_try_again_stays_closed(patience: Patience, server: FakeServer) -> None:
    server.play(full(), server.holds())
    sdk = patience.connect()
    generation = sdk.generate()
    patience.wake = generation._progress.close
    with pytest.raises(PenstockError, match="closed by this client"):
        sdk.read(generation)


def test_backoff_doubles_up_to_its_limit_and_is_spread_by_half() -> None:
    low, high = RetryPolicy(max_retries=9, random=lambda: 0.0), RetryPolicy(max_retries=9, random=lambda: 1.0)
    error = UnavailableError("down")
    assert [low.delay_s(error, n) for n in range(7)] == [0.25, 0.5, 1, 2, 4, 4, 4]
    assert [high.delay_s(error, n) for n in range(7)] == [0.5, 1, 2, 4, 8, 8, 8]


def test_policy_waits_for_no_server_that_asks_for_too_much() -> None:
    assert RetryPolicy().delay_s(OverloadedError("full", retry_after_s=61), 0) is None


def test_policy_gives_up_after_its_last_retry_and_on_errors_that_stay() -> None:
    assert RetryPolicy(max_retries=2).delay_s(UnavailableError("down"), 2) is None
    assert RetryPolicy().delay_s(InternalError("bug"), 0) is None
