"""Where our errors become what clients see: a gRPC status with details, or the OpenAI API's JSON."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import grpc

from core.errors import (
    ErrorCode,
    InvalidRequestError,
    OverloadedError,
    PenstockError,
    UnknownModelError,
    UnknownWorkerError,
)
from penstock.status import DETAILS_KEY, ErrorDetails, pack_details

_log = logging.getLogger(__name__)

_OPENAI_CODES = {ErrorCode.NOT_FOUND: "model_not_found", ErrorCode.OVERLOADED: "rate_limit_exceeded"}
"""Where the OpenAI API has a word of its own; else it is our code's name in lower case."""


class InternalServerError(PenstockError):
    """Something that should not have happened: the log says what, the client only that it did."""

    def __init__(self) -> None:
        super().__init__("internal error of the server")


@dataclass(frozen=True, slots=True)
class HttpError:
    status: int
    body: dict[str, Any]
    headers: Mapping[str, str]


def http_error(error: PenstockError) -> HttpError:
    """The OpenAI API's error object, with Retry-After in whole seconds where it is worth trying again."""
    body = openai_error(error.message, error.code.openai_type, _field(error), _openai_code(error.code))
    headers = {}
    if isinstance(error, OverloadedError):
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    return HttpError(error.code.http_status, body, headers)


def openai_error(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


@asynccontextmanager
async def aborting(context: grpc.aio.ServicerContext[Any, Any], request_id: str = "") -> AsyncIterator[None]:
    """Ends the call with the status of whatever error comes out of the block."""
    try:
        yield
    except grpc.aio.BaseError:
        raise  # the call itself is over: nobody is there to be told
    except PenstockError as error:
        await _abort(context, error, request_id)
    except Exception:  # noqa: BLE001 - it is logged, and the client is told
        _log.exception("request %s failed", request_id or "(no id)")
        await _abort(context, InternalServerError(), request_id)


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: PenstockError, request_id: str) -> NoReturn:
    code = grpc.StatusCode[error.code.grpc_status]
    trailing = ((DETAILS_KEY, packed_status(error, request_id)),)
    await context.abort(code, error.message, trailing_metadata=trailing)


def packed_status(error: Exception, request_id: str) -> bytes:
    """The google.rpc.Status of an error, serialized. What should not have happened is logged, and told as no more."""
    if not isinstance(error, PenstockError):
        _log.error("request %s failed", request_id or "(no id)", exc_info=error)
        error = InternalServerError()
    details = ErrorDetails(
        reason=cast("str", getattr(error, "reason", "")),
        request_id=request_id or None,
        field=_field(error),
        retry_after_s=error.retry_after_s if isinstance(error, OverloadedError) else None,
    )
    return pack_details(grpc.StatusCode[error.code.grpc_status], error.message, details)


def _field(error: PenstockError) -> str | None:
    if isinstance(error, UnknownModelError):
        return "model"
    if isinstance(error, UnknownWorkerError):
        return "worker_id"
    return error.field if isinstance(error, InvalidRequestError) else None


def _openai_code(code: ErrorCode) -> str:
    return _OPENAI_CODES.get(code, code.name.lower())
