"""The router's configuration refuses what can't work, naming the field."""

from __future__ import annotations

import pytest

from core.errors import ConfigError
from router.config import DispatchConfig, RouterConfig, SessionConfig


def test_the_defaults_are_valid() -> None:
    assert RouterConfig().dispatch.max_attempts == 3


@pytest.mark.parametrize("name", ["max_queue_len", "max_attempts", "stream_buffer_tokens", "unavailable_timeout_s"])
def test_a_limit_must_be_above_zero(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"router\.dispatch\.{name}: got 0, must be > 0"):
        DispatchConfig(**{name: 0})


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
