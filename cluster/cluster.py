"""A running Penstock: what `penstock serve`, the demo and the tests start and stop."""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import replace
from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.config import ClusterConfig, PoolConfig
from cluster.launcher import Launcher, SubprocessLauncher
from cluster.spec import Endpoints, RouterSpec, WorkerSpec
from core.errors import UnavailableError
from core.messages import WorkerRole
from engine.model_config import ModelConfig
from router.access.config import from_environment
from router.access.network import WorkerNetwork
from router.config import RouterConfig

SERVICE = "penstock.v1.Inference"
FAILURE_CHECK_S = 1.0


class Cluster:
    """Router and workers of one configuration. Owns the launcher, and with it every process; `close` ends them all.

    The launcher is the one that the configuration names, unless another is given.
    """

    def __init__(self, config: ClusterConfig, launcher: Launcher | None = None) -> None:
        config = replace(config, security=from_environment(config.security, os.environ))
        self.config, self._given = config, launcher
        self.launcher: Launcher
        self.endpoints: Endpoints

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start everything and wait until it can serve.

        Raises CheckpointError before anything is started, UnavailableError with the reason where it does not come up;
        then nothing is left running.
        """
        config, deadline = self.config, time.monotonic() + self.config.startup_timeout_s
        ModelConfig.from_folder(config.model)
        self.launcher = self._given or _launcher(config)
        try:
            router = RouterSpec(
                config.model.resolve(),
                config.model_name,
                config.engine.max_model_len,
                self._router(),
                config.log_level,
                config.security,
                config.num_routers,
            )
            self.endpoints = self.launcher.start(router, worker_specs(self.config), deadline - time.monotonic())
            self._wait_until_serving(deadline)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.launcher.close()

    def _router(self) -> RouterConfig:
        """On a cluster of several machines, a router that listens on loopback would be alone."""
        router = self.config.router
        return replace(router, host="0.0.0.0") if self.config.ray_address and router.host == "127.0.0.1" else router

    def _wait_until_serving(self, deadline: float) -> None:
        """Follow the router's health until it serves; between, ask the launcher whether it ever will."""
        network = WorkerNetwork.of(self.config.security)
        while time.monotonic() < deadline:
            timeout_s = min(FAILURE_CHECK_S, deadline - time.monotonic())
            with network.dial(self.endpoints.registry) as channel:
                stub: Any = health_pb2_grpc.HealthStub(channel)  # its published types know no Watch
                try:
                    request = health_pb2.HealthCheckRequest(service=SERVICE)
                    for reply in stub.Watch(request, timeout=timeout_s, wait_for_ready=True):
                        if reply.status == health_pb2.HealthCheckResponse.SERVING:
                            return
                except grpc.RpcError as error:
                    if error.code() not in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE):
                        raise UnavailableError(f"the router fails its health check: {error.details()}") from error
            if reason := self.launcher.failure():
                raise UnavailableError(reason)
        reason = self.launcher.failure(final=True) or "the log of the workers says why"
        raise UnavailableError(f"no worker could serve within {self.config.startup_timeout_s:g} s: {reason}")


def worker_specs(config: ClusterConfig) -> list[WorkerSpec]:
    """All workers that the configuration asks for. On one host each gets cores of its own, if there are enough."""
    pools: dict[WorkerRole, PoolConfig] = {
        WorkerRole.PREFILL: config.prefill,
        WorkerRole.DECODE: config.decode,
        WorkerRole.MIXED: config.mixed,
    }
    named = [(role, index) for role, pool in pools.items() for index in range(pool.num_workers)]
    cores = [] if config.ray_address else sorted(os.sched_getaffinity(0))  # one host: its cores are shared
    share = len(cores) // len(named)
    return [
        WorkerSpec(
            worker_id=f"{role.value}-{index}",
            role=role,
            model=config.model.resolve(),
            model_name=config.model_name,
            engine=replace(
                config.engine,
                num_threads=config.engine.num_threads or max(1, share or int(pools[role].num_cpus)),
            ),
            cpus=tuple(cores[place * share : (place + 1) * share]),
            transfer=config.transfer,
            host="" if config.ray_address else config.host,
            num_cpus=pools[role].num_cpus,
            num_gpus=pools[role].num_gpus,
            drain_timeout_s=config.drain_timeout_s,
            log_level=config.log_level,
            security=config.security,
        )
        for place, (role, index) in enumerate(named)
    ]


def _launcher(config: ClusterConfig) -> Launcher:
    if config.launcher == "subprocess":
        return SubprocessLauncher()
    if config.ray_address is None:
        # Read by Ray at import. Left alone, it turns token authentication on and writes a token into the home folder.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    from cluster.ray_launcher import RayLauncher

    return RayLauncher(config)
