"""`penstock serve`: a cluster, until ctrl-C."""

from __future__ import annotations

import json
import signal
from types import FrameType
from typing import TYPE_CHECKING

from rich.console import Console

from cluster.cluster import Cluster

if TYPE_CHECKING:
    from cluster.cli import Serve


def serve(command: Serve) -> int:
    """Start, say where, and wait for SIGINT or SIGTERM; then end everything that was started."""
    signal.signal(signal.SIGTERM, _interrupt)
    console = Console(stderr=True, highlight=False)
    config = command.cluster
    console.print(f"Starting {config.model_name} ({config.launcher}) ...")
    with Cluster(config) as cluster:
        grpc, http = cluster.endpoints.grpc, cluster.endpoints.http
        if command.json:
            pids = cluster.launcher.pids()
            others = [{"grpc": each.grpc, "http": each.http} for each in cluster.endpoints.others]
            told = {"grpc": grpc, "http": http, "model": config.model_name, "pids": pids, "others": others}
            print(json.dumps(told), flush=True)
        else:
            console.print(_greeting(config.model_name, grpc, http), soft_wrap=True, markup=False)
            for other in cluster.endpoints.others:
                console.print(f"As well at gRPC {other.grpc}, OpenAI http://{other.http}/v1", markup=False)
        try:
            signal.pause()
        except KeyboardInterrupt:
            console.print("Stopping ...")
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second ctrl-C must not leave processes behind
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return 0


def _interrupt(_signum: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _greeting(model: str, grpc: str, http: str) -> str:
    return f"""Serving {model}.
  gRPC    {grpc}
  OpenAI  http://{http}/v1
  Metrics http://{http}/metrics
Try it:
  curl http://{http}/v1/completions -H 'Content-Type: application/json' \\
    -d '{json.dumps({"model": model, "prompt": "def __init__(self", "max_tokens": 32, "temperature": 0})}'
Stop with ctrl-C."""
