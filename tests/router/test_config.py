"""The router's configuration refuses what can't work, naming the field."""

from __future__ import annotations

from typing import Any

import pytest

from core.errors import ConfigError
from router.config import DispatchConfig, PlacementConfig, RouterConfig, SessionConfig


def test_the_defaults_are_valid() -> None:
    assert RouterConfig().dispatch.max_attempts == 3


@pytest.mark.parametrize("name", ["max_queue_len", "max_attempts", "stream_buffer_tokens", "unavailable_timeout_s"])
def test_a_limit_must_be_above_zero(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"router\.dispatch\.{name}: got 0, must be > 0"):
        DispatchConfig(**{name: 0})  # type: ignore[arg-type]


def test_patience_must_outlast_the_heartbeat() -> None:
    with pytest.raises(ConfigError, match="dead_after_s"):
        SessionConfig(heartbeat_interval_s=5.0, dead_after_s=5.0)


def test_the_router_must_not_give_up_before_the_worker() -> None:
    with pytest.raises(ConfigError, match="accept_timeout_s"):
        DispatchConfig(accept_deadline_s=20.0)


def test_kv_travels_in_no_other_type() -> None:
    with pytest.raises(ConfigError, match=r"router\.kv_wire_dtype: got 'int4', must be one of 'auto', 'int8'"):
        RouterConfig(kv_wire_dtype="int4")  # type: ignore[arg-type]


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_must_be_one(port: int) -> None:
    with pytest.raises(ConfigError, match=r"router\.grpc_port"):
        RouterConfig(grpc_port=port)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"policy": "least"}, r"policy: got 'least', must be one of round_robin"),
        ({"slo_ttft_s": 0.0}, r"slo_ttft_s: got 0.0, must be > 0 seconds, or left out"),
        ({"slo_margin": 1.5}, r"slo_margin: got 1.5, must be in \(0, 1\]"),
        ({"overflow_s": -1.0}, r"overflow_s: got -1.0, must be >= 0"),
        ({"device_prices": {"cuda": -1.0}}, r"device_prices.cuda: got -1.0, must be a finite number >= 0"),
        ({"max_cached_blocks": 0}, r"max_cached_blocks: got 0, must be >= 1"),
    ],
)
def test_what_is_wrong_with_placement_is_named(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=rf"router\.placement\.{told}"):
        PlacementConfig(**changes)


def test_a_weight_must_be_above_zero() -> None:
    with pytest.raises(ConfigError, match=r"router\.dispatch\.tenant_weights\.me: got 0, must be a finite number > 0"):
        DispatchConfig(tenant_weights={"me": 0})
