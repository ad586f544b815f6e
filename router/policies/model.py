"""The words of placement: what a request needs, where it may go, what was decided and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from core.request import Disaggregation

CacheKind = tuple[str, int]
"""What names of blocks depend on: contents of the cache (`KVLayout.contents`) and block size."""


@dataclass(frozen=True, slots=True)
class Route:
    """Incarnations of the two workers; equal for a local route, which has no pair and so no epoch."""

    prefill: str
    decode: str
    epoch: int = 0

    @property
    def local(self) -> bool:
        return self.prefill == self.decode

    def touches(self, incarnations: frozenset[str]) -> bool:
        return self.prefill in incarnations or self.decode in incarnations


@dataclass(frozen=True, slots=True)
class Need:
    """What a request asks for.

    `num_tokens` are to be prefilled, `max_total_tokens` is where the request may end. Workers in `avoid` failed it;
    those in `refused_by` had no room and have not changed since. `hashes` names the prompt's full blocks for each kind
    of cache, the last token's never among them. `ttft_s` is what is left of the time to its first token, `itl_s` the
    gap between two tokens that it can bear; None is no limit.
    """

    num_tokens: int
    max_total_tokens: int
    avoid: frozenset[str] = frozenset()
    refused_by: frozenset[str] = frozenset()
    hashes: Mapping[CacheKind, Sequence[bytes]] = field(default_factory=dict)
    ttft_s: float | None = None
    itl_s: float | None = None
    mode: Disaggregation = "prefer"


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is predicted of a route. `ttft_s` counts from now; `finish_s` is when the last token comes.

    Cached tokens are those of the prompt that each side is thought to have already.
    """

    ttft_s: float
    itl_s: float
    finish_s: float
    num_cached_prefill: int = 0
    num_cached_decode: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """`reasons` are machine-readable: they label metrics. The first says where, the second why there."""

    route: Route
    reasons: tuple[str, ...]
    policy: str
    forecast: Forecast


@dataclass(frozen=True, slots=True)
class NoPlacement:
    """`possible`: a route exists and will do once it has room. Else only a change of the cluster can help."""

    possible: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Tuning:
    """What policies can be told beside their names."""

    overflow_s: float = 0.5
    """Predicted wait for a dedicated worker above which mixed ones help out (mixed_pool), in seconds."""
    slo_margin: float = 0.8
    """Share of an SLO that a prediction may use up (slo_aware, cost_aware)."""
    device_prices: Mapping[str, float] = field(default_factory=dict)
    """Price of an hour of a worker, by its device (cost_aware); 1 where the device is not named."""
