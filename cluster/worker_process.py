"""A worker as a process: engine, KV plane and session server, registered with the router for as long as it lives."""

from __future__ import annotations

import logging
import sys
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cluster import rpc
from cluster.registrar import Registrar
from cluster.session import WorkerService
from cluster.spec import WorkerSpec
from cluster.steps import StepHook, pass_by
from cluster.worker import FromRouter, SessionClosed, SessionOpened, Stop, Worker
from core.clock import Clock
from core.messages import Drain, WorkerHello, WorkerRole
from engine.engine import Engine
from engine.kv_storage import KVStorage
from kv_transfer.config import TransferConfig
from kv_transfer.events import KVEvent, Notify
from kv_transfer.plane import KVPlane
from penstock.v1 import worker_pb2, worker_pb2_grpc
from router.access.network import WorkerNetwork
from telemetry.logs import configure_logging

log = logging.getLogger(__name__)

MAX_ROUTERS = 8
"""Sessions and other calls that one worker serves at once."""
SERVICE = worker_pb2.DESCRIPTOR.services_by_name["Worker"].full_name


class WorkerProcess:
    """Owns the engine, its thread, the gRPC server and the KV plane; `wait` frees them all.

    `router_address` is asked before each registration, so that a router may come back elsewhere. Tests bring an
    `on_step`, and a `make_plane` over rendezvous of their own.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        router_address: Callable[[], str],
        on_step: StepHook = pass_by,
        make_plane: Callable[[str, KVStorage, str, TransferConfig, Clock, Notify], KVPlane] = KVPlane,
    ) -> None:
        self._spec, self._router_address = spec, router_address
        self._on_step, self._make_plane = on_step, make_plane
        self._incarnation = uuid.uuid4().hex
        self._ended = threading.Event()
        self._exit_code = 0

    def start(self) -> None:
        """Load the model, listen, and begin to register. Raises CheckpointError, ConfigError or OSError."""
        spec = self._spec
        configure_logging(sys.stderr, level=spec.log_level)
        self._network = WorkerNetwork.of(spec.security)
        self._engine = Engine.from_checkpoint(spec.model, spec.engine, spec.cpus)
        self._engine.warm_up()
        self._kv = self._make_plane(
            self._incarnation, self._engine.storage, spec.host, spec.transfer, time.monotonic, self._notify
        )
        self.worker = Worker(self._engine, self._kv, spec.role, self._incarnation, time.monotonic, self._on_step)
        self._server = self._serve()
        threading.Thread(target=self._turn, name="engine", daemon=True).start()
        threading.Thread(target=self._register, name="register", daemon=True).start()

    def drain(self) -> None:
        """Take nothing new, finish what there is within `drain_timeout_s`, then end. Returns at once."""
        self.worker.post(Drain(self._spec.drain_timeout_s))

    def stop(self) -> None:
        """End now; what is running fails over."""
        self.worker.post(Stop())

    def wait(self) -> int:
        """Until the engine has ended; the exit code."""
        self._ended.wait()
        self._server.stop(grace=1).wait(5)
        self._kv.close()
        return self._exit_code

    def _notify(self, event: KVEvent) -> None:
        self.worker.post(event)

    def _serve(self) -> grpc.Server:
        spec, worker = self._spec, self.worker
        server = grpc.server(
            ThreadPoolExecutor(2 * MAX_ROUTERS, thread_name_prefix="rpc"),
            options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 64 << 20)],
        )
        port = self._network.listen(server, f"{spec.host}:0")
        self._address = f"{spec.host}:{port}"
        hello = WorkerHello(
            worker_id=spec.worker_id,
            incarnation=self._incarnation,
            role=spec.role,
            layout=self._engine.layout,
            credits=spec.engine.max_num_seqs,
            num_blocks=self._engine.pool.num_blocks,
            max_model_len=self._engine.max_model_len,
            kv_address=self._kv.address,
            device=str(self._engine.storage.device),
            max_pairs=spec.transfer.max_pairs,
            runs_alone=spec.role is not WorkerRole.PREFILL,
        )
        servicer = WorkerService(
            hello,
            opened=lambda session: worker.post(SessionOpened(session)),
            received=lambda session, command: worker.post(FromRouter(session, command)),
            closed=lambda session: worker.post(SessionClosed(session)),
            secret=self._network.secret,
        )
        worker_pb2_grpc.add_WorkerServicer_to_server(servicer, server)
        healthy = health.HealthServicer()
        for service in ("", SERVICE):
            healthy.set(service, health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        server.start()
        return server

    def _turn(self) -> None:
        try:
            self.worker.run()
        except Exception:
            log.exception("worker %s ends", self._spec.worker_id)
            self._exit_code = 1
        finally:
            self._ended.set()

    def _register(self) -> None:
        spec = self._spec
        registration = worker_pb2.RegisterRequest(
            worker_id=spec.worker_id, incarnation=self._incarnation, address=self._address, role=rpc.ROLES[spec.role]
        )
        Registrar(registration, spec.role.value, self._network, self._router_address).run(self._ended)
