"""Run by test_nodes.py in a network namespace of its own: a Ray cluster of three nodes, Penstock across them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = "0" * 64

import ray
from ray.cluster_utils import Cluster as RayCluster

from cluster.cluster import Cluster
from cluster.config import ClusterConfig
from penstock import Client
from router.config import PlacementConfig, RouterConfig


def main(model: Path) -> None:
    nodes = RayCluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for role in ("prefill", "decode"):
            nodes.add_node(num_cpus=1, resources={role: 1})
        router = RouterConfig(grpc_port=0, http_port=0, placement=PlacementConfig(disaggregate="require"))
        config = ClusterConfig(model=model, ray_address=nodes.address, router=router)
        with Cluster(config) as cluster, Client(cluster.endpoints.grpc) as client:
            generation = client.generate("def __init__(self", max_tokens=8, temperature=0, ignore_eos=True)
            assert generation.text is not None
            free = [node["Resources"].keys() & {"prefill", "decode"} for node in ray.nodes()]
            left = ray.available_resources()
            print(
                json.dumps(
                    {
                        "num_tokens": len(generation.token_ids),
                        "num_nodes": sum(map(bool, free)),
                        "left": {role: left.get(role, 0) for role in ("prefill", "decode")},
                    }
                )
            )
    finally:
        nodes.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
