"""What can go wrong, as one small tree. `str(error)` is one sentence fit for a user.

PenstockError
├── InvalidRequestError     the request can never succeed as it is (also a ValueError)
├── AuthenticationError     who are you?
├── ModelNotFoundError
├── WorkerNotFoundError
├── OverloadedError         refused for now: `retry_after_s`
├── DeadlineExceededError   (also a TimeoutError)
├── RequestCancelledError
├── UnavailableError        no connection, a lost one, or no worker that can serve
└── InternalError
"""

from __future__ import annotations


class PenstockError(Exception):
    """Base of all errors of the SDK."""

    code: str = "INTERNAL"
    """Name of the gRPC status."""
    reason: str = ""
    """The server's machine-readable reason, where it gave one."""
    request_id: str | None = None
    """None where it is not known."""
    num_tokens: int = 0
    """Output tokens that had come before."""


class InvalidRequestError(PenstockError, ValueError):
    """Raised before anything is sent, or by the server. `field` names the argument at fault, where it is known."""

    code = "INVALID_ARGUMENT"

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class AuthenticationError(PenstockError):
    """The server does not know this client, or does not let it do this."""

    code = "UNAUTHENTICATED"


class ModelNotFoundError(PenstockError):
    """The server does not serve this model; the message lists those it does."""

    code = "NOT_FOUND"


class WorkerNotFoundError(PenstockError):
    """No worker of this name is connected; the message lists those that are."""

    code = "NOT_FOUND"


class OverloadedError(PenstockError):
    """Refused now; worth trying again after `retry_after_s` (None where the server did not say)."""

    code = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceededError(PenstockError, TimeoutError):
    """The request's time was up before its end."""

    code = "DEADLINE_EXCEEDED"


class RequestCancelledError(PenstockError):
    """Cancelled: by closing the generation or its client, or by `cancel` from anywhere."""

    code = "CANCELLED"


class UnavailableError(PenstockError):
    """The server can't be reached, was lost on the way, or has no worker for this now. The message names the target."""

    code = "UNAVAILABLE"


class InternalError(PenstockError):
    """The server's fault, or an answer that makes no sense."""
