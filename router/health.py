"""`grpc.health.v1`: SERVING for as long as some worker can serve."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

_Status = health_pb2.HealthCheckResponse


class Health:
    """Asks `can_serve` whenever `on_change` was called; those who watch are told."""

    def __init__(self, can_serve: Callable[[], bool], services: Sequence[str]) -> None:
        self._can_serve = can_serve
        self._services = ("", *services)
        self._servicer = health.aio.HealthServicer()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def on_change(self) -> None:
        self._changed.set()

    async def start(self, server: grpc.aio.Server) -> None:
        await self._tell()
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        self._task = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        """NOT_SERVING from now on, whatever happens."""
        await self._servicer.enter_graceful_shutdown()
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _follow(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self._tell()

    async def _tell(self) -> None:
        status = _Status.SERVING if self._can_serve() else _Status.NOT_SERVING
        for service in self._services:
            await self._servicer.set(service, status)
