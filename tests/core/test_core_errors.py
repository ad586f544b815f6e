"""Errors: one table to gRPC and HTTP, and sentences that name the field, the value and the fix."""

import grpc
import pytest

from core.errors import (
    ConfigError,
    ErrorCode,
    InvalidRequestError,
    OverloadedError,
    PenstockError,
    TransferError,
    UnknownModelError,
    did_you_mean,
    shorten,
)


@pytest.mark.parametrize("code", ErrorCode)
def test_every_code_is_a_grpc_status_of_its_own(code: ErrorCode) -> None:
    assert grpc.StatusCode[code.grpc_status] is not grpc.StatusCode.OK
    assert [other.grpc_status for other in ErrorCode].count(code.grpc_status) == 1


@pytest.mark.parametrize("code", ErrorCode)
def test_every_code_is_an_http_error(code: ErrorCode) -> None:
    assert 400 <= code.http_status < 600
    assert [other.http_status for other in ErrorCode].count(code.http_status) == 1


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InvalidRequestError("top_p", 2, "must be <= 1"), ErrorCode.INVALID_ARGUMENT, "top_p: got 2, must be <= 1"),
        (UnknownModelError("x", ["a", "b"]), ErrorCode.NOT_FOUND, "model: got 'x', must be one of 'a', 'b'"),
        (ConfigError("engine.dtype", "f", "no"), ErrorCode.INVALID_ARGUMENT, "engine.dtype: got 'f', no"),
        (OverloadedError("full", 0.5), ErrorCode.OVERLOADED, "full"),
        (TransferError("pair_down", "the pair is down"), ErrorCode.INTERNAL, "the pair is down"),
    ],
)
def test_an_error_is_one_sentence_with_a_code(error: PenstockError, code: ErrorCode, message: str) -> None:
    assert (error.code, error.message) == (code, message)


@pytest.mark.parametrize("length", [0, 58, 59, 1_000_000])
def test_a_shortened_value_keeps_to_its_limit_and_both_ends(length: int) -> None:
    text = shorten("a" * length)
    assert len(text) == min(60, length + 2)
    assert text[0] == text[-1] == "'"
    assert ("..." in text) == (length + 2 > 60)


def test_a_near_name_is_suggested_and_else_all_names_are_told() -> None:
    assert did_you_mean("block_sise", ["device", "block_size"]) == "did you mean 'block_size'?"
    assert did_you_mean("zzz", ["device", "block_size"]) == "known: block_size, device"
