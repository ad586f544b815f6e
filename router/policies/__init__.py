"""Where a request goes. Pure, one policy a file: the router and a simulator place with the very same code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from core.errors import ConfigError, did_you_mean
from router.policies.cost_aware import CostAware
from router.policies.least_loaded import LeastLoaded
from router.policies.mixed_pool import MixedPool
from router.policies.model import Tuning
from router.policies.power_of_two import PowerOfTwo
from router.policies.prefix_aware import PrefixAware
from router.policies.round_robin import RoundRobin
from router.policies.search import Policy
from router.policies.slo_aware import SloAware

POLICIES: Mapping[str, Callable[[Tuning], Policy]] = MappingProxyType(
    {
        "round_robin": lambda _: RoundRobin(),
        "least_loaded": lambda _: LeastLoaded(),
        "power_of_two": lambda _: PowerOfTwo(),
        "prefix_aware": lambda _: PrefixAware(),
        "cache_aware": lambda _: PrefixAware(),
        "slo_aware": lambda tuning: SloAware(tuning.slo_margin),
        "cost_aware": lambda tuning: CostAware(tuning.device_prices, tuning.slo_margin, tuning.overflow_s),
        "mixed_pool": lambda tuning: MixedPool(tuning.overflow_s),
    }
)
"""`cache_aware` is what SGLang's router calls `prefix_aware`."""


def make_policy(name: str, tuning: Tuning) -> Policy:
    """`ConfigError` where there is none of that name."""
    if name not in POLICIES:
        raise ConfigError("router.placement.policy", name, f"is not a policy; {did_you_mean(name, POLICIES)}")
    return POLICIES[name](tuning)


__all__ = ["POLICIES", "Policy", "make_policy"]
