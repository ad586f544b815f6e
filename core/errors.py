"""Our exceptions, and the one table that maps them to gRPC status and HTTP code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import Enum


class ErrorCode(Enum):
    """`(name of the gRPC status, HTTP code, OpenAI error type)` of each kind of failure."""

    INVALID_ARGUMENT = ("INVALID_ARGUMENT", 400, "invalid_request_error")
    UNAUTHENTICATED = ("UNAUTHENTICATED", 401, "authentication_error")
    FORBIDDEN = ("PERMISSION_DENIED", 403, "permission_error")
    NOT_FOUND = ("NOT_FOUND", 404, "not_found_error")
    OVERLOADED = ("RESOURCE_EXHAUSTED", 429, "rate_limit_error")
    CANCELLED = ("CANCELLED", 499, "request_cancelled")
    INTERNAL = ("INTERNAL", 500, "internal_error")
    UNAVAILABLE = ("UNAVAILABLE", 503, "service_unavailable")
    DEADLINE_EXCEEDED = ("DEADLINE_EXCEEDED", 504, "timeout_error")

    def __init__(self, grpc_status: str, http_status: int, openai_type: str) -> None:
        self.grpc_status = grpc_status
        self.http_status = http_status
        self.openai_type = openai_type


class PenstockError(Exception):
    """Base of all our errors. `str(error)` is one sentence fit for a user."""

    code = ErrorCode.INTERNAL

    @property
    def message(self) -> str:
        return str(self)


class InvalidRequestError(PenstockError):
    """A request that can never succeed as it is: names the field, the value and the fix."""

    code = ErrorCode.INVALID_ARGUMENT

    def __init__(self, field: str, value: object, fix: str) -> None:
        self.field, self.value, self.fix = field, value, fix
        super().__init__(f"{field}: got {shorten(value)}, {fix}")


class UnauthenticatedError(PenstockError):
    """Nobody has said who asks, or somebody nobody knows."""

    code = ErrorCode.UNAUTHENTICATED


class ForbiddenError(PenstockError):
    """It is known who asks, and that they may not."""

    code = ErrorCode.FORBIDDEN


class UnknownModelError(PenstockError):
    code = ErrorCode.NOT_FOUND

    def __init__(self, model: str, served: Iterable[str]) -> None:
        self.model = model
        super().__init__(f"model: got {model!r}, must be one of {', '.join(map(repr, served))}")


class UnknownRequestError(PenstockError):
    """Nothing is known, or known any more, of a request of this id."""

    code = ErrorCode.NOT_FOUND


class UnknownWorkerError(PenstockError):
    code = ErrorCode.NOT_FOUND

    def __init__(self, worker_id: str, connected: Iterable[str]) -> None:
        known = ", ".join(map(repr, connected))
        super().__init__(
            f"worker_id: got {shorten(worker_id)}, must be one of {known or 'none: no worker is connected'}"
        )


class OverloadedError(PenstockError):
    """Refused now; worth trying again after `retry_after_s`."""

    code = ErrorCode.OVERLOADED

    def __init__(self, message: str, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class DeadlineExceededError(PenstockError):
    code = ErrorCode.DEADLINE_EXCEEDED


class RequestCancelledError(PenstockError):
    code = ErrorCode.CANCELLED


class UnavailableError(PenstockError):
    """No worker can serve this now, and what could be tried again was."""

    code = ErrorCode.UNAVAILABLE


class ConfigError(PenstockError):
    """Start-up is refused: names the field's path, the value and the fix."""

    code = ErrorCode.INVALID_ARGUMENT

    def __init__(self, path: str, value: object, fix: str) -> None:
        self.path, self.value, self.fix = path, value, fix
        super().__init__(f"{path}: got {shorten(value)}, {fix}")


class CheckpointError(PenstockError):
    """A checkpoint folder that can't be loaded: names the file and what is wrong with it."""

    code = ErrorCode.INVALID_ARGUMENT


class TransferError(PenstockError):
    """A KV transfer failed closed. `reason` is machine-readable (it labels metrics)."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)


class IntegrityError(PenstockError):
    """An invariant of a pool or ledger is broken: a bug, never a user's fault."""


def shorten(value: object, limit: int = 60) -> str:
    """`repr(value)`, cut in the middle where it is longer than `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 10]}...{text[-7:]}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` where a known name is near, else the list of what is known."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
