"""Who is asking: from a header to a caller with quotas."""

from __future__ import annotations

import logging
import math
from contextvars import ContextVar

from core.clock import Clock
from core.errors import ForbiddenError, InvalidRequestError, OverloadedError, UnauthenticatedError
from router.access.bucket import Bucket
from router.access.config import SecurityConfig
from router.access.keys import KeyRecord, KeyRing

log = logging.getLogger(__name__)

_SCHEME = "bearer "


class Caller:
    """The owner of one key, and what is left of its quotas; the same object for all its calls."""

    def __init__(self, record: KeyRecord, clock: Clock) -> None:
        self.record = record
        self._clock = clock
        now_s = clock()
        self._requests = _bucket(record.requests_per_minute, now_s)
        self._tokens = _bucket(record.tokens_per_minute, now_s)

    @property
    def tenant(self) -> str:
        return self.record.id

    def count_request(self) -> None:
        """One call that makes work. `OverloadedError` with the time until the next one may come."""
        if self._requests is None:
            return
        if wait_s := self._requests.wait_s(1.0, self._clock()):
            raise self._over("requests", self._requests, wait_s)
        self._requests.take(1.0, self._clock())

    def check_tokens(self, num_prompt_tokens: int) -> None:
        """Whether a generation may begin: there must be enough for its prompt. What it costs, `spend` takes."""
        if self._tokens is None:
            return
        wait_s = self._tokens.wait_s(num_prompt_tokens, self._clock())
        if math.isinf(wait_s):
            limit = self._tokens.per_minute
            raise InvalidRequestError("prompt", num_prompt_tokens, f"must be at most {limit:g} tokens: the key's quota")
        if wait_s:
            raise self._over("tokens", self._tokens, wait_s)

    def spend(self, num_tokens: int) -> None:
        """Tokens of a prompt that was let in, or of output: what runs is not stopped, what comes next waits until the
        debt is paid."""
        if self._tokens is not None:
            self._tokens.take(num_tokens, self._clock())

    def _over(self, what: str, bucket: Bucket, wait_s: float) -> OverloadedError:
        message = f"the key {self.tenant!r} has used up its {bucket.per_minute:g} {what} per minute"
        return OverloadedError(f"{message}; try again in {wait_s:.1f} s", wait_s)


CALLER: ContextVar[Caller | None] = ContextVar("caller", default=None)
"""Who made the call that is being answered. None where no keys are asked for."""


class Access:
    """Turns `Authorization` headers into callers. With no keys configured, everybody may do everything."""

    def __init__(self, config: SecurityConfig, clock: Clock) -> None:
        self._clock = clock
        self.needs_key = bool(config.api_key or config.api_keys_file)
        self._ring = KeyRing(config.api_key, config.api_keys_file, clock)
        self._callers: dict[str, Caller] = {}

    def enter(self, authorization: str | None, *, counts: bool, admin: bool) -> Caller | None:
        """The caller; None where no keys are asked for. `counts`: the call makes work and is one of its requests.

        `UnauthenticatedError` without a valid key, `ForbiddenError` where the call is for admins and it is none,
        `OverloadedError` where it has used up its requests.
        """
        if not self.needs_key:
            return None
        record = self._ring.find(_key_in(authorization))
        if record is None:
            raise UnauthenticatedError("the API key is of nobody's that this server knows")
        if admin and not record.admin:
            raise ForbiddenError(f"the key {record.id!r} is not one of an admin")
        caller = self._callers.get(record.id)
        if caller is None or caller.record != record:  # new, or the file says something else now
            caller = self._callers[record.id] = Caller(record, self._clock)
        if counts:
            caller.count_request()
        return caller


def _key_in(authorization: str | None) -> str:
    if not authorization:
        raise UnauthenticatedError("an API key is needed: send it as 'Authorization: Bearer KEY'")
    if not authorization.lower().startswith(_SCHEME):
        raise UnauthenticatedError("authorization: must be 'Bearer KEY'")
    return authorization[len(_SCHEME) :].strip()


def _bucket(per_minute: float | None, now_s: float) -> Bucket | None:
    return None if per_minute is None else Bucket(per_minute, now_s)
