"""From the failure of a call to one of our errors, with either client."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

import penstock
from penstock import OverloadedError, PenstockError, UnavailableError
from penstock.status import ErrorDetails, pack_details, unpack_details
from penstock.v1.inference_pb2 import GenerateRequest
from penstock.v1.inference_pb2_grpc import InferenceStub
from tests.client.conftest import Connect, Sdk
from tests.client.fake_server import DEADLINE_S, FakeServer, delta, refuses, started, streams

KINDS = [
    ("INVALID_ARGUMENT", penstock.InvalidRequestError),
    ("OUT_OF_RANGE", penstock.InvalidRequestError),
    ("UNAUTHENTICATED", penstock.AuthenticationError),
    ("PERMISSION_DENIED", penstock.AuthenticationError),
    ("NOT_FOUND", penstock.ModelNotFoundError),
    ("RESOURCE_EXHAUSTED", penstock.OverloadedError),
    ("CANCELLED", penstock.RequestCancelledError),
    ("UNAVAILABLE", penstock.UnavailableError),
    ("DEADLINE_EXCEEDED", penstock.DeadlineExceededError),
    ("INTERNAL", penstock.InternalError),
    ("UNKNOWN", penstock.InternalError),
    ("UNIMPLEMENTED", penstock.InternalError),
]


def official(code: int, message: str, *parts: Any) -> bytes:
    """As any other server would write it, with google.rpc's own types."""
    status = status_pb2.Status(code=code, message=message)
    for part in parts:
        status.details.add().Pack(part)
    packed: bytes = status.SerializeToString()
    return packed


def error_of(sdk: Sdk) -> PenstockError:
    with pytest.raises(PenstockError) as caught:
        sdk.text(sdk.generate())
    return caught.value


@pytest.mark.parametrize(("code", "kind"), KINDS)
def test_each_status_has_its_error_even_without_details(
    connect: Connect, server: FakeServer, code: str, kind: type[PenstockError]
) -> None:
    server.play(refuses(grpc.StatusCode[code], "no, because of 水"))
    error = error_of(connect(max_retries=0))
    assert type(error) is kind
    assert (error.code, error.reason, error.request_id) == (code, "", None)
    assert "no, because of 水" in str(error)


@pytest.mark.parametrize(("code", "kind"), KINDS)
def test_official_details_are_read(connect: Connect, server: FakeServer, code: str, kind: type[PenstockError]) -> None:
    details = official(
        grpc.StatusCode[code].value[0],
        "no",
        error_details_pb2.DebugInfo(detail="of no interest"),
        error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=2, nanos=500_000_000)),
        error_details_pb2.BadRequest(
            field_violations=[error_details_pb2.BadRequest.FieldViolation(field="top_p", description="must be > 0")]
        ),
        error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="penstock", metadata={"request_id": "req-5"}),
    )
    server.play(refuses(grpc.StatusCode[code], "no", details))
    error = error_of(connect(max_retries=0))
    assert type(error) is kind
    assert (error.code, error.reason, error.request_id) == (code, "QUEUE_FULL", "req-5")
    assert getattr(error, "field", "top_p") == "top_p"
    assert getattr(error, "retry_after_s", 2.5) == 2.5


def test_official_reader_reads_what_we_pack(server: FakeServer) -> None:
    packed = pack_details(grpc.StatusCode.RESOURCE_EXHAUSTED, "voll 水", ErrorDetails("FULL", "req-1", "prompt", 1.25))
    server.play(refuses(grpc.StatusCode.RESOURCE_EXHAUSTED, "voll 水", packed))
    with grpc.insecure_channel(server.target) as channel, pytest.raises(grpc.RpcError) as caught:
        list(InferenceStub(channel).Generate(GenerateRequest()))
    status = rpc_status.from_call(caught.value)
    info, bad_request, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    assert (status.code, status.message) == (code_pb2.RESOURCE_EXHAUSTED, "voll 水")
    for part, message in zip(status.details, (info, bad_request, retry), strict=True):
        assert part.Unpack(message)
    assert (info.reason, info.domain, info.metadata["request_id"]) == ("FULL", "penstock", "req-1")
    assert [(v.field, v.description) for v in bad_request.field_violations] == [("prompt", "voll 水")]
    assert retry.retry_delay.ToTimedelta().total_seconds() == 1.25


def test_details_survive_the_way_there_and_back() -> None:
    details = ErrorDetails("SLOW", "req-1", "prompt", 0.0)
    assert unpack_details(pack_details(grpc.StatusCode.INTERNAL, "m", details)) == details


def test_reason_defaults_to_the_status() -> None:
    packed = pack_details(grpc.StatusCode.NOT_FOUND, "m", ErrorDetails())
    assert unpack_details(packed) == ErrorDetails(reason="NOT_FOUND")


def test_a_broken_part_costs_no_other_part() -> None:
    status = status_pb2.Status(
        details=[
            any_pb2.Any(type_url="type.googleapis.com/google.rpc.RetryInfo", value=b"\xff"),
            any_pb2.Any(type_url="type.googleapis.com/google.rpc.Unheard", value=b"\x01"),
        ]
    )
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="STILL_HERE"))
    assert unpack_details(status.SerializeToString()) == ErrorDetails(reason="STILL_HERE")


@pytest.mark.parametrize("broken", [b"", b"\xff\xff", b"\x1a\x05abc", b"not a status at all"])
def test_broken_details_cost_nothing_but_themselves(connect: Connect, server: FakeServer, broken: bytes) -> None:
    server.play(refuses(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", broken))
    error = error_of(connect(max_retries=0))
    assert isinstance(error, OverloadedError)
    assert error.retry_after_s is None


def test_error_after_tokens_tells_how_many_had_come(sdk: Sdk, server: FakeServer) -> None:
    server.play(
        refuses(grpc.StatusCode.INTERNAL, "worker lost", after=(started("req-3"), delta("a", 1), delta("b", 2, 3)))
    )
    generation = sdk.generate()
    with pytest.raises(penstock.InternalError, match=r"worker lost \(3 tokens had come\)") as caught:
        sdk.text(generation)
    assert (caught.value.num_tokens, caught.value.request_id) == (3, "req-3")
    assert generation.token_ids == (1, 2, 3)


def test_a_failed_generation_fails_again_when_read_again(sdk: Sdk, server: FakeServer) -> None:
    server.play(refuses(grpc.StatusCode.INTERNAL, "worker lost", after=(started(), delta("a", 1))))
    generation = sdk.generate()
    with pytest.raises(penstock.InternalError):
        sdk.text(generation)
    with pytest.raises(penstock.InternalError, match="worker lost"):
        sdk.read(generation)


def test_stream_without_its_last_message_is_an_error(sdk: Sdk, server: FakeServer) -> None:
    server.play(streams(started("req-4"), delta("a", 1)))
    with pytest.raises(penstock.InternalError, match=r"early \(1 tokens had come\)") as caught:
        sdk.text(sdk.generate())
    assert caught.value.request_id == "req-4"


def test_silent_server_means_deadline_exceeded(sdk: Sdk, server: FakeServer) -> None:
    server.play(server.holds(started("req-2"), delta("a", 1)))
    generation = sdk.generate(timeout_s=0.3)
    with pytest.raises(
        penstock.DeadlineExceededError, match=r"^the time limit .* was up \(1 tokens had come\)"
    ) as caught:
        sdk.text(generation)
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.request_id == "req-2"
    assert server.cancelled.get(timeout=DEADLINE_S) == "hi"


def test_no_server_is_unavailable_at_once_and_names_the_target(connect: Connect) -> None:
    nowhere = FakeServer()
    nowhere.stop()
    sdk = connect(nowhere.target, max_retries=0)
    with pytest.raises(UnavailableError, match=nowhere.target):
        sdk.text(sdk.generate())
    with pytest.raises(UnavailableError, match=nowhere.target):
        sdk.call("server_info")


def test_a_server_stopped_on_the_way_is_unavailable_and_tells_how_far_it_came(sdk: Sdk, server: FakeServer) -> None:
    server.play(server.holds(started(), delta("a", 1), delta("b", 2)))
    generation = sdk.generate()
    sdk.read(generation)
    sdk.read(generation)
    server.stop()
    with pytest.raises(UnavailableError, match=rf"{server.target}.*2 tokens had come") as caught:
        sdk.read(generation)
    assert caught.value.num_tokens == 2


def test_a_server_killed_on_the_way_is_unavailable_and_tells_how_far_it_came(connect: Connect) -> None:
    command = [sys.executable, "-m", "tests.client.fake_server"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        sdk = connect(process.stdout.readline().strip())
        generation = sdk.generate()
        sdk.read(generation)
        sdk.read(generation)
        process.kill()
        with pytest.raises(UnavailableError, match="2 tokens had come"):
            sdk.read(generation)


def test_message_over_the_servers_limit_is_the_callers_error_and_not_retried(sdk: Sdk, server: FakeServer) -> None:
    with pytest.raises(penstock.InvalidRequestError, match="larger than max"):
        sdk.text(sdk.generate("x" * (5 * 2**20)))


def test_every_error_of_the_package_is_in_one_tree() -> None:
    errors = [value for value in vars(penstock).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(errors) == 10
    assert all(issubclass(error, PenstockError) for error in errors)
