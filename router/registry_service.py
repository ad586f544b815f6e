"""The Registry service: workers say where they are, again and again, so that both sides may restart in any order."""

from __future__ import annotations

import grpc.aio

from core.errors import InvalidRequestError
from router.rpc import Registration, add_registry
from router.workers import Workers


class RegistryService:
    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def register(self, registration: Registration) -> bool:
        """Whether the router holds a session with this incarnation; `InvalidRequestError` on an empty field."""
        for name in ("worker_id", "incarnation", "address"):
            if not getattr(registration, name):
                raise InvalidRequestError(name, getattr(registration, name), "must not be empty")
        return self._workers.register(registration)

    def add_to(self, server: grpc.aio.Server) -> None:
        add_registry(server, self.register)
