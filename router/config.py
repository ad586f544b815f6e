"""Limits and patience of the router, as a user writes them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Literal, get_args

from core.errors import ConfigError
from core.kv_layout import WireDtype
from core.request import Disaggregation
from router.policies import POLICIES
from router.policies.model import Tuning
from text.tools.formats import FormatName


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """How the router keeps in touch with workers. All in seconds."""

    heartbeat_interval_s: float = 1.0
    """Between two heartbeats to a worker; each renews the leases of what the router still wants."""
    dead_after_s: float = 5.0
    """A session that brought nothing for so long is dead. Workers speak at least once a second."""
    connect_timeout_s: float = 5.0
    """For dialling a worker, up to its hello."""
    reconnect_backoff_s: float = 0.2
    """First wait after a lost session; doubles at each failure."""
    max_reconnect_backoff_s: float = 2.0
    """Longest wait between two attempts to reach a worker."""
    forget_after_s: float = 15.0
    """A worker that is out of reach and has not registered for so long is forgotten."""
    pair_timeout_s: float = 15.0
    """For both workers of a pair to report its channel up."""
    pair_backoff_s: float = 0.2
    """First wait after a pair went down; doubles at each failure."""
    max_pair_backoff_s: float = 5.0
    """Longest wait between two attempts to bring a pair up."""
    pair_quarantine_after: int = 3
    """Failures in a row, of a pair's channel or of transfers over it, after which other pairs go before."""
    pair_quarantine_s: float = 10.0
    """How long a pair whose transfers fail is left alone before it is connected anew."""

    def __post_init__(self) -> None:
        check_positive(self, "router.sessions")
        if self.dead_after_s <= self.heartbeat_interval_s:
            raise ConfigError(
                "router.sessions.dead_after_s",
                self.dead_after_s,
                f"must be longer than heartbeat_interval_s = {self.heartbeat_interval_s}",
            )


@dataclass(frozen=True, slots=True)
class DispatchConfig:
    """How the router queues, places and recovers requests."""

    max_queue_len: int = 1024
    """Requests that may wait for a worker; further ones are refused with a time to retry after. While several
    tenants ask, one alone may have two thirds of the places."""
    max_queued_tokens: int = 2_000_000
    """Prompt tokens of the requests that wait, which bounds the memory they take: about 40 bytes each."""
    priority_aging_s: float = 5.0
    """Waiting for so long, in seconds, counts as much as one level of priority."""
    tenant_weights: dict[str, float] = field(default_factory=dict)
    """Shares in what the workers do, by tenant: an API key's, or the `user` of requests without; 1 if not named."""
    max_attempts: int = 3
    """Attempts at one request, the first included, before its failure reaches the client."""
    stream_buffer_tokens: int = 4096
    """Tokens kept for a client that reads slower than they come; beyond, its request is cancelled."""
    prompt_part_tokens: int = 4096
    """Longer prompts go to workers in parts of this many tokens, so that a cancel never waits behind one."""
    unavailable_timeout_s: float = 30.0
    """How long a request waits while no worker could serve it at all, in seconds."""
    reserve_timeout_s: float = 5.0
    """For a decode worker to answer a reservation, in seconds."""
    accept_deadline_s: float = 10.0
    """For the last KV segment to reach a decode worker after the first token, in seconds."""
    accept_timeout_s: float = 15.0
    """For a decode worker to say that it took over, in seconds; longer than `accept_deadline_s`."""
    release_timeout_s: float = 10.0
    """For a worker to confirm that it let go, in seconds. By then the lease, no longer renewed, has run out."""
    stats_grace_s: float = 0.05
    """How long the end of a very short answer waits for its transfer's figures, in seconds."""

    def __post_init__(self) -> None:
        check_positive(self, "router.dispatch")
        for tenant, weight in self.tenant_weights.items():
            if not (weight > 0 and math.isfinite(weight)):
                raise ConfigError(f"router.dispatch.tenant_weights.{tenant}", weight, "must be a finite number > 0")
        if self.accept_timeout_s < self.accept_deadline_s:
            raise ConfigError(
                "router.dispatch.accept_timeout_s",
                self.accept_timeout_s,
                f"must be at least accept_deadline_s = {self.accept_deadline_s}",
            )


PolicyName = Literal[
    "round_robin",
    "least_loaded",
    "power_of_two",
    "prefix_aware",
    "cache_aware",
    "slo_aware",
    "cost_aware",
    "mixed_pool",
]


@dataclass(frozen=True, slots=True)
class PlacementConfig:
    """How workers are chosen."""

    policy: PolicyName = "least_loaded"
    """round_robin; least_loaded: done first, as predicted; power_of_two: the better of two drawn; prefix_aware (also
    cache_aware): weighs cached prefixes against queues; slo_aware: the fullest that meets the targets; cost_aware: the
    cheapest that is fast enough; mixed_pool: mixed workers only for what dedicated ones can't take in time."""
    disaggregate: Disaggregation = "prefer"
    """Prefill and decode on two workers, for requests that don't say: require; prefer: unless one alone is predicted to
    cost less, which short and cached prompts do; local: always on one."""
    slo_ttft_s: float | None = None
    """Target for the time to the first token, in seconds; requests predicted to miss it are refused at once."""
    slo_itl_s: float | None = None
    """Target for the gap between two tokens, in seconds."""
    slo_margin: float = 0.8
    """Share of a target that a prediction may use up (slo_aware, cost_aware)."""
    overflow_s: float = 0.5
    """Predicted wait above which others help out, in seconds (mixed_pool: mixed workers; cost_aware: dearer ones)."""
    device_prices: dict[str, float] = field(default_factory=dict)
    """Price of an hour of a worker by its device, as `penstock status` names it, else 1 (cost_aware)."""
    max_cached_blocks: int = 1_000_000
    """Blocks in the caches of workers that the router remembers, up to 350 bytes each."""

    def __post_init__(self) -> None:
        path = "router.placement"
        if self.policy not in POLICIES:
            raise ConfigError(f"{path}.policy", self.policy, f"must be one of {', '.join(POLICIES)}")
        if self.disaggregate not in get_args(Disaggregation):
            fix = f"must be one of {', '.join(get_args(Disaggregation))}"
            raise ConfigError(f"{path}.disaggregate", self.disaggregate, fix)
        for name in ("slo_ttft_s", "slo_itl_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{path}.{name}", value, "must be > 0 seconds, or left out")
        if not 0 < self.slo_margin <= 1:
            raise ConfigError(f"{path}.slo_margin", self.slo_margin, "must be in (0, 1]")
        if not self.overflow_s >= 0:
            raise ConfigError(f"{path}.overflow_s", self.overflow_s, "must be >= 0 seconds")
        for device, price in self.device_prices.items():
            if not (price >= 0 and math.isfinite(price)):
                raise ConfigError(f"{path}.device_prices.{device}", price, "must be a finite number >= 0")
        if self.max_cached_blocks < 1:
            raise ConfigError(f"{path}.max_cached_blocks", self.max_cached_blocks, "must be >= 1")

    @property
    def tuning(self) -> Tuning:
        """What the policies are told."""
        return Tuning(self.overflow_s, self.slo_margin, self.device_prices)


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Where the router listens, and its limits. Port 0 takes a free one."""

    host: str = "127.0.0.1"
    """Address to listen on, for clients and workers alike."""
    grpc_port: int = 50051
    """gRPC: Inference for clients, Registry for workers."""
    http_port: int = 8000
    """HTTP: the OpenAI API, /health and /metrics."""
    registry_port: int = 0
    """gRPC: Registry for workers, where clients must speak TLS and so have a port of their own."""
    kv_wire_dtype: WireDtype = "auto"
    """How K and V travel for requests that don't say: auto as the cache holds them, int8 rounded. Not exact."""
    max_request_traces: int = 1024
    """Requests that `penstock trace` and `penstock explain` can still tell of: the last ones, about 2 KB each."""
    tool_call_parser: Literal["auto"] | FormatName = "auto"
    """How the model writes calls of tools; auto reads it off the chat template."""
    allowed_origins: tuple[str, ...] = ()
    """Origins whose pages may call the HTTP API from a browser, such as https://chat.example.com; "*" is any."""
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    sessions: SessionConfig = field(default_factory=SessionConfig)

    def __post_init__(self) -> None:
        for name in ("grpc_port", "http_port", "registry_port"):
            if not 0 <= getattr(self, name) < 65536:
                raise ConfigError(f"router.{name}", getattr(self, name), "must be a port, or 0 for a free one")
        if self.max_request_traces < 1:
            raise ConfigError("router.max_request_traces", self.max_request_traces, "must be >= 1")
        if self.kv_wire_dtype not in ("auto", "int8"):
            raise ConfigError("router.kv_wire_dtype", self.kv_wire_dtype, "must be one of 'auto', 'int8'")
        formats = ("auto", *get_args(FormatName))
        if self.tool_call_parser not in formats:
            fix = f"must be one of {', '.join(map(repr, formats))}"
            raise ConfigError("router.tool_call_parser", self.tool_call_parser, fix)


def check_positive(config: SessionConfig | DispatchConfig, path: str) -> None:
    """`ConfigError` unless every field is above zero."""
    for f in fields(config):
        value = getattr(config, f.name)
        if not isinstance(value, dict) and not value > 0:
            raise ConfigError(f"{path}.{f.name}", value, "must be > 0")
