"""Where workers register when they or clients must speak TLS: a port of their own."""

from __future__ import annotations

import grpc.aio
from grpc_health.v1 import health_pb2_grpc

from core.errors import ConfigError
from router.access.network import WorkerNetwork
from router.health import Health
from router.registry_service import RegistryService


class WorkerDoor:
    """Registry and health, nothing else. `address` is known once it has started."""

    def __init__(self, registry: RegistryService, health: Health, network: WorkerNetwork) -> None:
        self._registry, self._health, self._network = registry, health, network
        self._server: grpc.aio.Server | None = None
        self.address = ""

    async def start(self, host: str, port: int) -> None:
        """`host` as a URL has it. `ConfigError` where the port can't be had."""
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        self._registry.add_to(self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        try:
            bound = self._network.listen(self._server, f"{host}:{port}")
        except RuntimeError as error:
            raise ConfigError("router.registry_port", port, f"can't be listened on at {host}: {error}") from error
        await self._server.start()
        self.address = f"{host}:{bound}"

    async def stop(self, grace_s: float) -> None:
        """Idempotent."""
        if self._server:
            await self._server.stop(grace_s)
