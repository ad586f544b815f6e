"""The cluster as a user describes it: `cluster.yaml`, and command-line flags generated from the same fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_type_hints

import tyro
import yaml
from pydantic import TypeAdapter, ValidationError

from core.errors import ConfigError, did_you_mean
from engine.config import EngineConfig
from kv_transfer.config import TransferConfig
from router.config import RouterConfig

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """The workers of one role."""

    num_workers: int = 0
    """Workers to start."""
    num_cpus: float = 1.0
    """CPUs each worker reserves in Ray."""
    num_gpus: float = 0.0
    """GPUs each worker reserves in Ray."""

    def __post_init__(self) -> None:
        for name in ("num_workers", "num_cpus", "num_gpus"):
            if getattr(self, name) < 0:
                raise ConfigError(name, getattr(self, name), "must be >= 0")


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """Everything `penstock serve` needs to know."""

    model: Path
    """Folder of a Hugging Face checkpoint."""
    served_model_name: str | None = None
    """Name that clients ask for; by default the folder's name."""
    launcher: Literal["ray", "subprocess"] = "ray"
    """Who starts and restarts the processes: Ray, or this process alone."""
    ray_address: str | None = None
    """An existing Ray cluster ("auto" or host:port); by default a local one is started."""
    host: str = "127.0.0.1"
    """Address that workers listen on and are reached at (subprocess launcher; Ray uses each node's own)."""
    startup_timeout_s: float = 120.0
    """How long the cluster may take until it can serve."""
    drain_timeout_s: float = 30.0
    """How long a worker that is asked to stop may take to finish what it has."""
    log_level: Literal["debug", "info", "warning", "error"] = "warning"
    prefill: PoolConfig = PoolConfig(num_workers=1)
    """Workers that read prompts, on nodes with the custom resource `prefill`."""
    decode: PoolConfig = PoolConfig(num_workers=1)
    """Workers that write tokens, on nodes with the custom resource `decode`."""
    mixed: PoolConfig = PoolConfig()
    """Workers that do both, without a transfer, on nodes with the custom resource `mixed`."""
    engine: Annotated[EngineConfig, tyro.conf.arg(name="")] = field(default_factory=EngineConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    router: RouterConfig = field(default_factory=RouterConfig)

    def __post_init__(self) -> None:
        for name in ("startup_timeout_s", "drain_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(name, getattr(self, name), "must be > 0 seconds")
        if not self.mixed.num_workers and not (self.prefill.num_workers and self.decode.num_workers):
            workers = f"prefill {self.prefill.num_workers}, decode {self.decode.num_workers}, mixed 0"
            raise ConfigError("num_workers", workers, "needs a prefill and a decode worker, or a mixed one")

    @property
    def model_name(self) -> str:
        return self.served_model_name or self.model.resolve().name


def load_config(path: Path) -> ClusterConfig:
    """Read `cluster.yaml`; relative `model` paths start at the file's folder. Raises ConfigError."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError("config", str(path), f"can't be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("config", str(path), f"is not YAML: {' '.join(str(error).split())}") from error
    config = parse(ClusterConfig, values)
    if config.model.is_absolute():
        return config
    return dataclasses.replace(config, model=path.parent / config.model)


def parse(kind: type[T], values: object) -> T:
    """Build the dataclass `kind` from plain values; ConfigError with the field's path for the first thing wrong."""
    check_names(kind, values, "")
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"]) or "config"
        raise ConfigError(path, first["input"], first["msg"][:1].lower() + first["msg"][1:]) from error


def check_names(kind: type, values: object, path: str) -> None:
    """Refuse keys that are no field of the dataclass `kind`, nested ones included, and name the nearest field."""
    if not isinstance(values, Mapping):
        raise ConfigError(path or "config", values, f"must be a mapping of the fields of {kind.__name__}")
    hints = get_type_hints(kind)
    for key, value in values.items():
        here = f"{path}.{key}" if path else str(key)
        if key not in hints:
            raise ConfigError(here, value, f"is not a field; {did_you_mean(str(key), hints)}")
        if dataclasses.is_dataclass(hints[key]):
            check_names(cast("type", hints[key]), value, here)


def to_json(config: Any) -> str:
    """The dataclass as JSON, for another process; `from_json` gives it back."""
    return TypeAdapter(type(config)).dump_json(config).decode()


def from_json(kind: type[T], text: str) -> T:
    return TypeAdapter(kind).validate_json(text)
