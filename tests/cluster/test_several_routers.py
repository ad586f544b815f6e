"""Two routers over the same workers: neither disturbs the other, and what one leaves behind the other goes on with."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.cli import EMBEDDED_MODEL
from cluster.cluster import Cluster
from cluster.config import ClusterConfig
from engine.config import EngineConfig
from penstock import Client
from router.config import RouterConfig

OPTIONS: dict[str, Any] = {
    "max_tokens": 200,
    "temperature": 1.0,
    "seed": 11,
    "ignore_eos": True,
    "disaggregate": "require",
}
PROMPT = "def __init__(self"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    config = ClusterConfig(
        model=EMBEDDED_MODEL,
        launcher="subprocess",
        num_routers=2,
        engine=EngineConfig(num_blocks=64, num_threads=1),
        router=RouterConfig(grpc_port=0, http_port=0),
    )
    with Cluster(config) as running:
        yield running


def test_both_routers_use_the_same_pair_at_once_and_neither_ends_the_others_channel(cluster: Cluster) -> None:
    targets = cluster.endpoints.grpc, cluster.endpoints.others[0].grpc
    with Client(targets[0], timeout_s=60) as first, Client(targets[1], timeout_s=60) as second:
        generations = [client.generate(PROMPT, **OPTIONS) for client in (first, second, first, second)]
        texts = {generation.text for generation in generations}
        assert len(texts) == 1
        assert {generation.stats.num_attempts for generation in generations if generation.stats} == {1}
        epochs = [[pair.epoch for pair in client.server_info().pairs if pair.up] for client in (first, second)]
        assert [len(each) for each in epochs] == [1, 1]
        assert epochs[0] != epochs[1]


def test_what_a_killed_router_was_streaming_the_other_goes_on_with_to_the_letter(cluster: Cluster) -> None:
    targets = [cluster.endpoints.grpc, cluster.endpoints.others[0].grpc]
    with Client(targets[1], timeout_s=60) as client:
        undisturbed = client.generate(PROMPT, **OPTIONS)
        text, token_ids = undisturbed.text, undisturbed.token_ids
    with Client(targets, timeout_s=60) as client:
        generation = client.generate(PROMPT, **OPTIONS)
        parts = [next(generation).text for _ in range(5)]
        assert len(generation.token_ids) < len(token_ids), "it was over before the router could be killed"
        os.kill(cluster.launcher.pids()["router"], signal.SIGKILL)
        parts += [delta.text for delta in generation]
        assert generation.token_ids == token_ids
        assert "".join(parts) == text
        assert client.target == targets[1]
        assert generation.usage == undisturbed.usage
