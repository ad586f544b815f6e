"""What comes out of a generation that ends well, with either client."""

from __future__ import annotations

import dataclasses

import grpc
import pytest

from penstock import Delta, FinishReason, Stats, Usage
from penstock.v1 import inference_pb2 as pb
from tests.client.conftest import Sdk
from tests.client.fake_server import FakeServer, delta, finished, refuses, says, started, streams


def test_deltas_come_in_the_order_they_were_sent(sdk: Sdk, server: FakeServer) -> None:
    server.play(streams(started(), delta("He", 5), delta("", 6, 7), delta("llo", 8), finished(4)))
    assert sdk.read_all(sdk.generate()) == [Delta((5,), "He"), Delta((6, 7), ""), Delta((8,), "llo")]


def test_text_runs_to_the_end_and_holds_what_was_read_before(sdk: Sdk, server: FakeServer) -> None:
    server.play(says("a", "b", "c"))
    generation = sdk.generate()
    first = sdk.read(generation)
    assert str(first) == "a"
    assert sdk.text(generation) == "abc"
    assert sdk.text(generation) == "abc"
    assert generation.token_ids == (0, 1, 2)


def test_text_of_many_languages_arrives_unharmed(sdk: Sdk, server: FakeServer) -> None:
    text = "naïve café 水門 🌊 \x00 \u200f"
    server.play(says(text))
    assert sdk.text(sdk.generate(text)) == text
    assert server.requests[0].prompt == text


def test_what_the_server_settled_is_known_after_the_first_delta(sdk: Sdk, server: FakeServer) -> None:
    server.play(streams(started("req-9", seed=2**64 - 1), delta("a", 1), finished(1)))
    generation = sdk.generate(request_id="mine")
    sdk.read(generation)
    assert (generation.request_id, generation.model, generation.seed) == ("req-9", "tiny", 2**64 - 1)


def test_what_is_not_known_yet_is_none(sdk: Sdk, server: FakeServer) -> None:
    server.play(server.holds())
    generation = sdk.generate()
    for name in ("request_id", "model", "seed", "finish_reason", "usage", "stats"):
        assert getattr(generation, name) is None
    assert generation.token_ids == ()


def test_end_brings_reason_usage_and_stats(sdk: Sdk, server: FakeServer) -> None:
    server.play(
        streams(
            started(),
            delta("a", 1),
            finished(1, pb.FINISH_REASON_LENGTH, transfer_s=0.4, transfer_exposed_s=0.1, kv_bytes=4096, queue_s=0.0),
        )
    )
    generation = sdk.generate()
    sdk.read_all(generation)
    assert generation.finish_reason is FinishReason.LENGTH
    assert generation.usage == Usage(num_prompt_tokens=3, num_output_tokens=1)
    assert generation.stats == Stats("p0", "d0", 1, queue_s=0.0, transfer_s=0.4, transfer_exposed_s=0.1, kv_bytes=4096)
    assert generation.stats.overlap_ratio == pytest.approx(0.75)


def test_events_and_reasons_of_a_newer_server_do_no_harm(sdk: Sdk, server: FakeServer) -> None:
    server.play(streams(started(), pb.GenerateResponse(), delta("a", 1), finished(1, 99)))  # type: ignore[arg-type]
    generation = sdk.generate()
    assert sdk.text(generation) == "a"
    assert generation.finish_reason is FinishReason.OTHER


def test_a_connection_lost_after_the_last_message_takes_nothing_away(sdk: Sdk, server: FakeServer) -> None:
    server.play(refuses(grpc.StatusCode.UNAVAILABLE, "gone", after=(started(), delta("a", 1), finished(1))))
    generation = sdk.generate()
    assert sdk.text(generation) == "a"
    assert generation.finish_reason is FinishReason.STOP


def test_reading_past_the_end_gives_the_end_again(sdk: Sdk, server: FakeServer) -> None:
    server.play(says("a"))
    generation = sdk.generate()
    sdk.read_all(generation)
    assert sdk.read(generation) is None


@pytest.mark.parametrize(
    ("transfer_s", "exposed_s", "ratio"), [(None, None, None), (0.0, 0.0, None), (1.0, 0.25, 0.75), (1.0, 2.0, 0.0)]
)
def test_overlap_ratio_is_the_hidden_share(transfer_s: float, exposed_s: float, ratio: float | None) -> None:
    assert Stats(transfer_s=transfer_s, transfer_exposed_s=exposed_s).overlap_ratio == ratio


def test_stats_tell_all_that_the_wire_tells() -> None:
    assert {f.name for f in dataclasses.fields(Stats)} == set(pb.RequestStats.DESCRIPTOR.fields_by_name)
