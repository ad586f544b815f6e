"""The Registry service: workers say where they are, again and again, so that both sides may restart in any order."""

from __future__ import annotations

import grpc.aio

from core.errors import InvalidRequestError, OverloadedError
from core.secret import Secret
from router.rpc import Registration, add_registry
from router.workers import Workers

MAX_NAME_LEN = 256
MAX_WORKERS = 8192
"""Registered at once, connected or not."""


class RegistryService:
    def __init__(self, workers: Workers, secret: Secret | None = None) -> None:
        """With a `secret`, only workers that prove to have it are heard."""
        self._workers, self._secret = workers, secret

    def register(self, registration: Registration) -> bool:
        """Whether the router holds a session with this incarnation; `InvalidRequestError` on a field that is empty or
        endless, `OverloadedError` where there are too many workers already."""
        for name in ("worker_id", "incarnation", "address"):
            value = getattr(registration, name)
            if not 0 < len(value) <= MAX_NAME_LEN or not value.isprintable():
                fix = f"must have 1 to {MAX_NAME_LEN} characters, all printable"
                raise InvalidRequestError(name, value, fix)
        if not self._workers.knows(registration.worker_id) and len(self._workers) >= MAX_WORKERS:
            raise OverloadedError(f"{MAX_WORKERS} workers are registered already", retry_after_s=5.0)
        return self._workers.register(registration)

    def add_to(self, server: grpc.aio.Server) -> None:
        add_registry(server, self.register, self._secret)
