"""Patience and sizes of KV transfers, as a user writes them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

from core.errors import ConfigError
from kv_transfer.frame import MAX_PAYLOAD_BYTES
from kv_transfer.streaming import Streaming

Backend = Literal["auto", "shm", "tcp", "gloo", "nccl"]


@dataclass(frozen=True, slots=True)
class TransferConfig:
    """All durations in seconds, on the clock of the worker that waits."""

    backend: Backend = "auto"
    """What carries the payload. auto is shm (shared memory) between two workers on the CPUs of one host, nccl between
    two GPUs, and tcp otherwise, also where both share one GPU."""
    lease_s: float = 5.0
    """How long a worker holds blocks for a router that does not renew its interest."""
    progress_timeout_s: float = 30.0
    """How long a transfer that has begun may stand still before it is given up."""
    queue_timeout_s: float = 300.0
    """How long a transfer may wait for its prompt to be computed before it is given up."""
    connect_timeout_s: float = 10.0
    """For both sides of a pair to meet."""
    silence_timeout_s: float = 5.0
    """A peer that says nothing for so long is dead; must be longer than `keepalive_s`."""
    keepalive_s: float = 1.0
    """Between two signs of life on an idle channel."""
    max_staging_mib: int = 256
    """Memory for segments on their way out, per pair; a prefill that is faster than the link waits."""
    max_pairs: int = 16
    """Channels a worker has at once. With more partners, those that were not used for longest give way."""
    coalesce_kib: int = 4096
    """Segments that wait together leave together, up to this size."""
    streaming: Streaming = "auto"
    """When a prompt's KV leaves: layerwise as soon as a layer is computed, serial after the last one; auto in batches
    whose size follows from the prompt's and from the link, as it is measured while it is used."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in ("backend", "streaming") and not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"transfer.{f.name}", value, "must be a finite number > 0")
        if self.backend not in get_args(Backend):
            raise ConfigError("transfer.backend", self.backend, "must be one of 'auto', 'shm', 'tcp', 'gloo', 'nccl'")
        if self.streaming not in get_args(Streaming):
            text = "must be one of 'auto', 'layerwise', 'serial'"
            raise ConfigError("transfer.streaming", self.streaming, text)
        if self.silence_timeout_s <= self.keepalive_s:
            raise ConfigError(
                "transfer.silence_timeout_s", self.silence_timeout_s, f"must be > keepalive_s = {self.keepalive_s:g}"
            )
        if self.max_pairs != int(self.max_pairs):
            raise ConfigError("transfer.max_pairs", self.max_pairs, "must be a whole number")
        if self.coalesce_bytes > MAX_PAYLOAD_BYTES:
            raise ConfigError("transfer.coalesce_kib", self.coalesce_kib, f"must be <= {MAX_PAYLOAD_BYTES >> 10}")

    @property
    def max_staging_bytes(self) -> int:
        return self.max_staging_mib << 20

    @property
    def coalesce_bytes(self) -> int:
        return self.coalesce_kib << 10
