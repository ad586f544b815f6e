"""The cluster as a user describes it: `cluster.yaml`, and command-line flags generated from the same fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_type_hints

import tyro
import yaml
from pydantic import TypeAdapter, ValidationError

from core.errors import ConfigError, did_you_mean
from engine.config import EngineConfig
from kv_transfer.config import TransferConfig
from router.access.config import SecurityConfig
from router.config import RouterConfig

T = TypeVar("T")

MAX_ROUTERS = 8
"""As many as a worker serves (cluster/worker_process.py)."""
SECRETS = ("security.api_key", "security.cluster_secret")
"""Fields whose values no error shows."""


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """The workers of one role."""

    num_workers: int = 0
    """Workers to start."""
    num_cpus: float = 1.0
    """CPUs each worker reserves in Ray."""
    num_gpus: float = 0.0
    """GPUs each worker reserves in Ray."""


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
    num_routers: int = 1
    """Routers that share all workers; clients that know several go on with another when one dies. Those after the first
    take the ports above its own."""
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
    security: Annotated[SecurityConfig, tyro.conf.arg(name="")] = field(default_factory=SecurityConfig)

    def __post_init__(self) -> None:
        for name in ("startup_timeout_s", "drain_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(name, getattr(self, name), "must be > 0 seconds")
        if not 1 <= self.num_routers <= MAX_ROUTERS:
            raise ConfigError("num_routers", self.num_routers, f"must be 1 to {MAX_ROUTERS}")
        for role in ("prefill", "decode", "mixed"):
            for f in dataclasses.fields(PoolConfig):
                if not (value := getattr(getattr(self, role), f.name)) >= 0:
                    raise ConfigError(f"{role}.{f.name}", value, "must be >= 0")
        for role in ("prefill", "decode"):
            if not getattr(self, role).num_workers and not self.mixed.num_workers:
                raise ConfigError(f"{role}.num_workers", 0, "must be >= 1, or mixed.num_workers must be")
        num_workers = self.prefill.num_workers + self.decode.num_workers + self.mixed.num_workers
        if self.router.placement.disaggregate == "require" and num_workers < 2:
            fix = "must be prefer or local with one worker, for it takes two"
            raise ConfigError("router.placement.disaggregate", "require", fix)
        if self.ray_address is not None and self.launcher != "ray":
            raise ConfigError("ray_address", self.ray_address, f"must be left out with launcher {self.launcher!r}")

    @property
    def model_name(self) -> str:
        return self.served_model_name or self.model.resolve().name


def load_config(path: Path) -> ClusterConfig:
    """Read `cluster.yaml`; relative `model` paths start at the file's folder. Raises ConfigError."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("config", path.name, f"can't be read: {error.strerror}: {path}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("config", path.name, f"is not YAML: {_problem(error)}") from error
    config = parse(ClusterConfig, {} if values is None else values)
    if config.model.is_absolute():
        return config
    return dataclasses.replace(config, model=path.parent / config.model)


def _problem(error: yaml.YAMLError | UnicodeDecodeError) -> str:
    """What is wrong and where, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def parse(kind: type[T], values: object) -> T:
    """Build the dataclass `kind` from plain values; ConfigError with the field's path for the first thing wrong."""
    check_names(kind, values, "")
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise ConfigError(path, None, "must be set: it has no default") from error
        fix = first["msg"].replace("Input should be", "must be").replace("Input is", "is")
        given = "a value" if path.startswith(SECRETS) else first["input"]
        raise ConfigError(path, given, "must be a path" if first["type"] == "path_type" else fix) from error


def check_names(kind: type, values: object, path: str) -> None:
    """Refuse keys that are no field of the dataclass `kind`, nested ones included, and name the nearest field."""
    hints = get_type_hints(kind)
    if not isinstance(values, Mapping):
        raise ConfigError(path or "config", values, f"must be a mapping of fields; known: {', '.join(hints)}")
    sections = {name: cast("type", hint) for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    for key, value in values.items():
        here = f"{path}.{key}" if path else str(key)
        if key in sections:
            check_names(sections[key], value, here)
        elif key not in hints:
            nested = [f"{here.removesuffix(str(key))}{s}.{key}" for s in sections if key in get_type_hints(sections[s])]
            fix = f"did you mean {nested[0]!r}?" if nested else did_you_mean(str(key), hints)
            raise ConfigError(here, value, f"is not a field; {fix}")
        elif isinstance(value, bool) and bool not in (hints[key], *get_args(hints[key])):  # would pass for 0 or 1
            raise ConfigError(here, value, "must not be a boolean")


def to_json(config: Any) -> str:
    """The dataclass as JSON, for another process; `from_json` gives it back."""
    return TypeAdapter(type(config)).dump_json(config).decode()


def from_json(kind: type[T], text: str) -> T:
    return TypeAdapter(kind).validate_json(text)
