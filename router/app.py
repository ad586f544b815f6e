"""The router as a whole: dispatcher, gRPC and HTTP servers, health and metrics, started and stopped as one."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version as installed_version

import grpc.aio
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from core.clock import Clock
from core.errors import ConfigError, PenstockError
from core.model_info import ModelInfo
from router import health
from router.access.access import Access
from router.access.config import SecurityConfig
from router.access.guards import GrpcGuard, HttpGuard
from router.access.network import WorkerNetwork
from router.access.tls import grpc_credentials
from router.admin_service import ADMIN, AdminService, PolicySwitch, add_admin
from router.cluster_watch import ClusterWatch
from router.config import RouterConfig
from router.dispatcher import Dispatcher
from router.generation import Generator
from router.health import Health
from router.http_server import HttpServer
from router.inference_service import SERVICE, InferenceService, add_to_server
from router.observer import MetricsObserver, Observers, cluster_sample
from router.openai_http import MAX_BODY_BYTES, OpenAIApi
from router.openai_tools import ToolCalling
from router.policies.fleet import Fleet
from router.registry_service import RegistryService
from router.rpc import REGISTRY
from router.rpc_traces import SERVICE as TRACES
from router.rpc_traces import TraceService
from router.traces import TraceRecorder
from router.validation import Validator
from router.worker_door import WorkerDoor
from router.workers import Workers
from telemetry.metrics import Metrics
from text.tokenizer import Tokenizer

GRPC_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_BODY_BYTES),
    ("grpc.so_reuseport", 0),  # or two routers could share a port unnoticed
    # A client whose machine is gone says no goodbye: probe it, and let clients probe us as often.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
)


class RouterApp:
    """Lives on one event loop. `start`, then `stop`; addresses are known in between.

    `clock` is monotonic, `wall_clock` counts seconds since 1970, `draw_bits(k)` gives k random bits, for ids and seeds.
    """

    def __init__(
        self,
        config: RouterConfig,
        *,
        model: ModelInfo,
        tokenizer: Tokenizer,
        security: SecurityConfig | None = None,
        router_id: str = "router",
        clock: Clock = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        draw_bits: Callable[[int], int] = secrets.randbits,
    ) -> None:
        self._config = config
        self._security = security or SecurityConfig()
        self._network = WorkerNetwork.of(self._security)
        self._access = Access(self._security, clock)
        self._model = model
        self._tokenizer = tokenizer
        self._clock, self._wall_clock, self._draw_bits = clock, wall_clock, draw_bits
        self._version = installed_version("penstock-server")
        self.metrics = Metrics(model.name)
        self.workers = Workers(
            config.sessions,
            router_id=router_id,
            clock=clock,
            fingerprint=model.fingerprint or None,
            fleet=Fleet(config.placement.max_cached_blocks),
            network=self._network,
        )
        self._health = Health(
            {
                "": lambda: self.dispatcher.can_serve,
                SERVICE: lambda: self.dispatcher.can_serve,
                **dict.fromkeys((REGISTRY, TRACES, ADMIN), lambda: True),
            }
        )
        self._watch = ClusterWatch(lambda: self.dispatcher.info())
        name_of = self.workers.name_of
        recorder = TraceRecorder(config.max_request_traces, clock=clock, wall_clock=wall_clock, name_of=name_of)
        self._traces = TraceService(recorder, clock)
        observer = Observers(MetricsObserver(self.metrics, self._on_cluster_change, name_of), recorder)
        self.dispatcher = Dispatcher(
            config.dispatch, workers=self.workers, clock=clock, observer=observer, placement=config.placement
        )
        self.metrics.watch_cluster(lambda: cluster_sample(self.dispatcher.info()))
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")
        self._validator = Validator(model, tokenizer, draw_bits, config.kv_wire_dtype, config.placement.disaggregate)
        self._generator = Generator(
            model=model.name,
            dispatcher=self.dispatcher,
            validator=self._validator,
            tokenizer=tokenizer,
            executor=self._executor,
            on_refusal=self._on_refusal,
        )
        self._grpc: grpc.aio.Server | None = None
        self._http: HttpServer | None = None
        self._worker_door: WorkerDoor | None = None
        self.grpc_address = ""
        self.registry_address = ""
        self.http_address = ""

    async def start(self) -> None:
        """Both servers answer when this returns. `ConfigError` where an address can't be had; nothing is left open."""
        try:
            self._http = self._bind_http()
            self._grpc = await self._start_grpc()
            await self._start_worker_door()
            await self._http.start()
        except BaseException:
            await self.stop(0.0)
            raise
        self.http_address = join_address(self._config.host, self._http.port)

    async def stop(self, grace_s: float) -> None:
        """New requests are refused from now on; those that run have `grace_s`, then they are ended. Idempotent."""
        self._health.stop()
        self._watch.stop()
        await asyncio.gather(
            *([self._grpc.stop(grace_s)] if self._grpc else []),
            *([self._worker_door.stop(grace_s)] if self._worker_door else []),
            *([self._http.stop(grace_s)] if self._http else []),
        )
        self.dispatcher.close()
        await self.workers.close()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _bind_http(self) -> HttpServer:
        api = OpenAIApi(
            model=self._model,
            validator=self._validator,
            generator=self._generator,
            dispatcher=self.dispatcher,
            metrics=self.metrics.render,
            trace=self._traces.as_json,
            wall_clock=self._wall_clock,
            draw_bits=self._draw_bits,
            version=self._version,
            tools=ToolCalling(
                self._tokenizer, None if self._config.tool_call_parser == "auto" else self._config.tool_call_parser
            ),
            allowed_origins=self._config.allowed_origins,
        )
        app = HttpGuard(api.app(), self._access)
        return HttpServer(app, self._config.host, self._config.http_port, self._security)

    async def _start_grpc(self) -> grpc.aio.Server:
        server = grpc.aio.server(interceptors=[GrpcGuard(self._access)], options=GRPC_OPTIONS)
        service = InferenceService(
            model=self._model,
            tokenizer=self._tokenizer,
            validator=self._validator,
            generator=self._generator,
            dispatcher=self.dispatcher,
            watch=self._watch,
            clock=self._clock,
            version=self._version,
        )
        add_to_server(service, server)
        if not self._security.has_worker_door:
            RegistryService(self.workers, self._network.secret).add_to(server)
        self._traces.add_to(server)
        add_admin(AdminService(self.workers, PolicySwitch(self.dispatcher, self._config.placement)), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE, REGISTRY, TRACES, ADMIN, health.SERVICE, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        host, wanted = self._config.host, self._config.grpc_port
        address, credentials = join_address(host, wanted), grpc_credentials(self._security)
        try:
            port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError("router.grpc_port", wanted, f"can't be listened on at {host}: {error}") from error
        await server.start()
        self.grpc_address = join_address(host, port)
        return server

    async def _start_worker_door(self) -> None:
        self.registry_address = self.grpc_address
        if self._security.has_worker_door:
            registry = RegistryService(self.workers, self._network.secret)
            self._worker_door = WorkerDoor(registry, self._health, self._network)
            await self._worker_door.start(url_host(self._config.host), self._config.registry_port)
            self.registry_address = self._worker_door.address

    def _on_cluster_change(self) -> None:
        self._health.on_change()
        self._watch.on_change()

    def _on_refusal(self, error: PenstockError) -> None:
        self.metrics.on_failure(error.code.name.lower())


def join_address(host: str, port: int) -> str:
    return f"{url_host(host)}:{port}"


def url_host(host: str) -> str:
    """An IPv6 address in brackets, everything else as it is."""
    return f"[{host}]" if ":" in host else host
