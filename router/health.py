"""`grpc.health.v1`: SERVING for as long as a service can serve."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from router.changing import Changing

SERVICE = "grpc.health.v1.Health"

Context = grpc.aio.ServicerContext[Any, Any]
_Reply = health_pb2.HealthCheckResponse


class Health(Changing, health_pb2_grpc.HealthServicer):
    """Asks whether a service can serve when it is asked, and, for those who watch, whenever `on_change` was called.

    `services` has a question for each by name, and one for the server as a whole (""). Unlike grpcio's own servicer, it
    lets go of those who watch when the server stops, which else would wait for them: NOT_SERVING from then on.
    """

    def __init__(self, services: Mapping[str, Callable[[], bool]]) -> None:
        super().__init__()
        self._services = services

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> _Reply:  # noqa: N802
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r} here")
        return _Reply(status=self._status(request.service))

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:  # noqa: N802
        told: int | None = None
        while True:
            changed = self._changed
            status = self._status(request.service)
            if status != told:
                await context.write(_Reply(status=status))
                told = status
            if self._stopping:
                return
            await changed.wait()

    def _status(self, service: str) -> Any:
        if service not in self._services:
            return _Reply.SERVICE_UNKNOWN
        return _Reply.SERVING if self._services[service]() and not self._stopping else _Reply.NOT_SERVING
