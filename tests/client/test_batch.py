"""Many prompts in one call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from penstock import Delta, FinishReason, InternalError, InvalidRequestError, OverloadedError, RequestCancelledError
from penstock.status import ErrorDetails, pack_details
from penstock.v1 import details_pb2
from penstock.v1 import inference_pb2 as pb
from tests.client.conftest import Connect, Sdk
from tests.client.fake_server import DEADLINE_S, BatchScript, FakeServer, delta, finished, started


def answers(*responses: tuple[int, pb.GenerateResponse | details_pb2.Status]) -> BatchScript:
    """These, by the index of their prompt, then status OK."""

    def script(request: pb.GenerateBatchRequest, context: Any) -> Iterator[pb.GenerateBatchResponse]:
        for index, each in responses:
            if isinstance(each, pb.GenerateResponse):
                yield pb.GenerateBatchResponse(index=index, response=each)
            else:
                yield pb.GenerateBatchResponse(index=index, error=each)

    return script


def refuses(request: pb.GenerateBatchRequest, context: Any) -> Iterator[pb.GenerateBatchResponse]:
    context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
    yield pb.GenerateBatchResponse()


BOTH = answers(
    (0, started("a")), (1, started("b")), (1, delta("x", 5)), (0, delta("y", 6)), (1, finished(1)), (0, finished(1))
)


def test_what_comes_is_told_by_prompt(sdk: Sdk, server: FakeServer) -> None:
    server.batches.put(BOTH)
    batch = sdk.batch(["one", "two"])
    assert [sdk.next_of(batch) for _ in range(3)] == [(1, Delta((5,), "x")), (0, Delta((6,), "y")), None]
    first, second = sdk.results(batch)
    assert (first.request_id, first.text, first.token_ids, first.error) == ("a", "y", (6,), None)
    assert (second.text, second.finish_reason) == ("x", FinishReason.STOP)
    assert second.usage is not None
    assert second.usage.num_output_tokens == 1


def test_prompts_are_texts_token_ids_or_chats_with_options_for_all(sdk: Sdk, server: FakeServer) -> None:
    server.batches.put(answers(*((i, finished(0)) for i in range(3))))
    chat = [{"role": "user", "content": "hi"}]
    batch = sdk.batch(["a", [1, 2], chat], max_tokens=3, seed=7, metadata=[("traceparent", "00-1")])
    sdk.results(batch)
    first, second, third = server.asked[0].requests
    assert (first.prompt, list(second.token_ids.ids), third.messages.messages[0].content) == ("a", [1, 2], "hi")
    assert [each.sampling.seed for each in server.asked[0].requests] == [7, 8, 9]
    assert {each.sampling.max_tokens for each in server.asked[0].requests} == {3}
    assert server.metadata[0]["traceparent"] == "00-1"


def test_one_that_fails_has_an_error_and_the_others_go_on(sdk: Sdk, server: FakeServer) -> None:
    packed = pack_details(grpc.StatusCode.UNAVAILABLE, "no worker", ErrorDetails(request_id="b"))
    lost = details_pb2.Status.FromString(packed)
    server.batches.put(answers((1, started("b")), (1, lost), (0, started("a")), (0, delta("y", 6)), (0, finished(1))))
    first, second = sdk.results(sdk.batch(["one", "two"]))
    assert (first.text, first.error) == ("y", None)
    assert second.error is not None
    assert (type(second.error).__name__, second.error.request_id) == ("UnavailableError", "b")
    assert "no worker" in str(second.error)


def test_a_refused_batch_is_tried_again(connect: Connect, server: FakeServer) -> None:
    waits: list[float] = []
    sdk = connect(sleep=waits.append, random=lambda: 1.0)
    server.batches.put(refuses)
    server.batches.put(BOTH)
    assert [result.text for result in sdk.results(sdk.batch(["one", "two"]))] == ["y", "x"]
    assert waits == [0.5]


def test_a_batch_that_is_refused_for_good_raises(connect: Connect, server: FakeServer) -> None:
    sdk = connect(max_retries=0)
    server.batches.put(refuses)
    with pytest.raises(OverloadedError):
        sdk.results(sdk.batch(["one"]))


def test_a_stream_that_ends_early_is_an_error(sdk: Sdk, server: FakeServer) -> None:
    server.batches.put(answers((0, started("a")), (0, finished(0))))
    with pytest.raises(InternalError, match="before the end of 1 generations"):
        sdk.results(sdk.batch(["one", "two"]))


def test_closing_it_cancels_what_is_left(sdk: Sdk, server: FakeServer) -> None:
    def holds(request: pb.GenerateBatchRequest, context: Any) -> Iterator[pb.GenerateBatchResponse]:
        context.add_callback(lambda: server.cancelled.put("batch"))
        yield pb.GenerateBatchResponse(index=0, response=delta("a", 1))
        yield from server.batches.get(timeout=DEADLINE_S)(request, context)

    server.batches.put(holds)
    batch = sdk.batch(["one"])
    assert sdk.next_of(batch) == (0, Delta((1,), "a"))
    sdk.close_iterator(batch)
    assert server.cancelled.get(timeout=DEADLINE_S) == "batch"
    server.batches.put(answers())
    with pytest.raises(RequestCancelledError):
        sdk.next_of(batch)


@pytest.mark.parametrize("prompts", [[5], [[]], [{"role": "user"}]])
def test_what_is_no_prompt_is_refused_here(sdk: Sdk, prompts: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"^prompts: got"):
        sdk.batch(prompts)


def test_a_client_that_is_closed_ends_its_batches(connect: Connect, server: FakeServer) -> None:
    def holds(request: pb.GenerateBatchRequest, context: Any) -> Iterator[pb.GenerateBatchResponse]:
        yield pb.GenerateBatchResponse(index=0, response=delta("a", 1))
        yield from server.batches.get(timeout=DEADLINE_S)(request, context)

    sdk = connect()
    server.batches.put(holds)
    batch = sdk.batch(["one"])
    sdk.next_of(batch)
    sdk.call("close")
    server.batches.put(answers())
    with pytest.raises(RequestCancelledError):
        sdk.next_of(batch)
