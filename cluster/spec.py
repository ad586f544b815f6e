"""What a launcher must know to start one process. Frozen, and JSON on the way there."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from core.messages import WorkerRole
from engine.config import EngineConfig
from kv_transfer.config import TransferConfig
from router.access.config import SecurityConfig
from router.config import RouterConfig


@dataclass(frozen=True, slots=True)
class RouterSpec:
    model: Path
    model_name: str
    max_model_len: int | None
    config: RouterConfig
    log_level: str
    security: SecurityConfig = field(default_factory=SecurityConfig)
    num_routers: int = 1


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """`host` empty means: the address of the node that Ray chooses. `cpus`: the cores that are this worker's; empty
    where nobody knows, or where there are more workers than cores."""

    worker_id: str
    role: WorkerRole
    model: Path
    model_name: str
    engine: EngineConfig
    cpus: tuple[int, ...]
    transfer: TransferConfig
    host: str
    num_cpus: float
    num_gpus: float
    drain_timeout_s: float
    log_level: str
    security: SecurityConfig = field(default_factory=SecurityConfig)


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where a router answers, as `host:port`; `registry` is where workers register. Of the first router, with
    those of the `others` of the same cluster."""

    grpc: str
    http: str
    registry: str
    others: tuple[Endpoints, ...] = ()


@dataclass(frozen=True, slots=True)
class Started:
    """The first word of a process: it runs (a router also says where it answers), or why it can't."""

    endpoints: Endpoints | None = None
    error: str = ""
