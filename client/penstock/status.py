"""The wire form of errors: `google.rpc` details in trailing metadata, and the one table from gRPC status to exception.

Penstock's servers pack an `ErrorInfo` (domain `penstock`, `metadata["request_id"]`), a `BadRequest` for the field at
fault and a `RetryInfo` for how long to wait; any gRPC client that knows google.rpc can read them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message

from penstock.errors import (
    AuthenticationError,
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    PenstockError,
    RequestCancelledError,
    UnavailableError,
    WorkerNotFoundError,
)
from penstock.v1.details_pb2 import BadRequest, ErrorInfo, RetryInfo, Status

DETAILS_KEY = "grpc-status-details-bin"
DOMAIN = "penstock"

_TYPE_URL = "type.googleapis.com/"
_PACKAGE = "google.rpc."

_ERRORS: dict[grpc.StatusCode, type[PenstockError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequestError,
    grpc.StatusCode.UNAUTHENTICATED: AuthenticationError,
    grpc.StatusCode.PERMISSION_DENIED: AuthenticationError,
    grpc.StatusCode.NOT_FOUND: ModelNotFoundError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.CANCELLED: RequestCancelledError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
}


@dataclass(frozen=True, slots=True)
class ErrorDetails:
    """What a status says beyond code and message; each is None or "" where it says nothing."""

    reason: str = ""
    request_id: str | None = None
    field: str | None = None
    retry_after_s: float | None = None


def pack_details(code: grpc.StatusCode, message: str, details: ErrorDetails) -> bytes:
    """A serialized `google.rpc.Status`: the value of `DETAILS_KEY` in trailing metadata."""
    info = ErrorInfo(reason=details.reason or code.name, domain=DOMAIN)
    if details.request_id:
        info.metadata["request_id"] = details.request_id
    parts: list[Message] = [info]
    if details.field is not None:
        violation = BadRequest.FieldViolation(field=details.field, description=message)
        parts.append(BadRequest(field_violations=[violation]))
    if details.retry_after_s is not None:
        delay = Duration()
        delay.FromNanoseconds(round(details.retry_after_s * 1e9))
        parts.append(RetryInfo(retry_delay=delay))
    anys = [Any(type_url=_TYPE_URL + _PACKAGE + part.DESCRIPTOR.name, value=part.SerializeToString()) for part in parts]
    return Status(code=code.value[0], message=message, details=anys).SerializeToString()


def unpack_details(packed: bytes) -> ErrorDetails:
    """Reads what it can: what is broken or of an unknown type is passed over."""
    status, info, bad_request, retry = Status(), ErrorInfo(), BadRequest(), RetryInfo()
    _parse(status, packed)
    for part in status.details:
        for message in (info, bad_request, retry):
            if part.type_url.rpartition("/")[2] == _PACKAGE + message.DESCRIPTOR.name:
                _parse(message, part.value)
    delay = retry.retry_delay
    return ErrorDetails(
        reason=info.reason,
        request_id=info.metadata.get("request_id"),
        field=bad_request.field_violations[0].field if bad_request.field_violations else None,
        retry_after_s=max(0.0, delay.seconds + delay.nanos / 1e9) if retry.HasField("retry_delay") else None,
    )


def _parse(message: Message, data: bytes) -> None:
    try:
        message.ParseFromString(data)
    except DecodeError:
        message.Clear()


def error_from(
    failure: grpc.RpcError, *, target: str, request_id: str | None = None, num_tokens: int | None = None
) -> PenstockError:
    """Our error for a failed call. `num_tokens` is None where the call had not begun to answer."""
    trailing = cast("Iterable[tuple[str, str | bytes]]", failure.trailing_metadata() or ())
    packed = next((value for key, value in trailing if key == DETAILS_KEY), None)
    details = unpack_details(packed) if isinstance(packed, bytes) else ErrorDetails()
    return _made(failure.code(), failure.details(), details, target, request_id, num_tokens)


def error_of_status(status: Status, *, target: str) -> PenstockError:
    """Our error for a failure that is part of an answer."""
    code = next((code for code in grpc.StatusCode if code.value[0] == status.code), grpc.StatusCode.UNKNOWN)
    return _made(code, status.message, unpack_details(status.SerializeToString()), target, None, None)


def _made(
    code: grpc.StatusCode,
    message: str | None,
    details: ErrorDetails,
    target: str,
    request_id: str | None,
    num_tokens: int | None,
) -> PenstockError:
    error = _error(code, message or code.name, details, target, num_tokens)
    error.code = code.name
    error.reason = details.reason
    error.request_id = details.request_id or request_id
    error.num_tokens = num_tokens or 0
    return error


def _error(
    code: grpc.StatusCode, message: str, details: ErrorDetails, target: str, num_tokens: int | None
) -> PenstockError:
    kind = _ERRORS.get(code, InternalError)
    if kind is ModelNotFoundError and details.field == "worker_id":
        kind = WorkerNotFoundError
    if kind is UnavailableError:
        message = f"{target} is unavailable: {message}"
    elif kind is DeadlineExceededError and "Deadline Exceeded" in message:  # gRPC's own words for it
        message = "the time limit of the request was up"
    if num_tokens is not None:
        message = f"{message} ({num_tokens} tokens had come)"
    if kind is InvalidRequestError:
        return InvalidRequestError(message, details.field)
    if kind is OverloadedError:
        if "larger than max" in message:  # gRPC's own refusal of a message over its size limit: no retry helps
            return InvalidRequestError(message)
        return OverloadedError(message, details.retry_after_s)
    return kind(message)
