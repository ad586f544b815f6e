"""How much of what the load tool reports is its own: `python -m benchmarks.serve.overhead [--rate R] [--json]`.

A server of known delays in a process of its own notes when requests came and when it wrote each token. Beside the
tool's records that gives, per request, how late it was sent and, per token, how late it was seen.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serve.backends import OpenAIBackend, Shape
from benchmarks.serve.driver import Driver, Load
from benchmarks.serve.http_stream import Url
from benchmarks.serve.workload import Plan, Prompts, arrivals_s

ROOT = Path(__file__).resolve().parents[2]
NUM_TOKENS, GAP_S, NUM_INPUTS = 64, 0.01, 500
CLOSE_S = 30.0


@dataclass(frozen=True, slots=True)
class Overhead:
    """In ms. `send`: due to received by the server; `token`: written by the server to seen by the tool; `gap`: by how
    much a gap that the tool reports differs from the server's own."""

    send: dict[str, float]
    token: dict[str, float]
    gap: dict[str, float]


def measure(rate: float, num_requests: int) -> Overhead:
    command = [sys.executable, "-m", "benchmarks.serve.known_server", str(NUM_TOKENS), str(GAP_S)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            url = server.stdout.readline().strip()
            plans = [
                Plan(i, due_s, NUM_INPUTS, NUM_TOKENS)
                for i, due_s in enumerate(arrivals_s(num_requests, rate, burstiness=1.0, seed=0))
            ]
            origin_s, load = asyncio.run(_load(url, plans))
            told, _ = server.communicate("", timeout=CLOSE_S)
        finally:
            server.kill()
    return compare(load, json.loads(told), origin_s)


async def _load(url: str, plans: list[Plan]) -> tuple[float, Load]:
    driver = Driver(OpenAIBackend(Url.parse(url, "/v1/completions"), Shape("tiny", Prompts(1000))))
    origin_s = time.perf_counter()
    return origin_s, await driver.run(plans)


def compare(load: Load, told: dict[str, Any], origin_s: float) -> Overhead:
    """`origin_s` is the zero of the load's times on the server's clock. Requests come in the order they are due."""
    send, seen, gaps = [], [], []
    for record, arrived_s, written_s in zip(load.records, told["arrived_s"], told["written_s"], strict=True):
        send.append(arrived_s - origin_s - record.due_s)
        pairs = [*zip(record.tokens_s, written_s, strict=False)]
        seen += [came_s + origin_s - wrote_s for came_s, wrote_s in pairs]
        own = np.diff([wrote_s for _, wrote_s in pairs])
        gaps += np.abs(np.asarray(record.gaps_s) - own).tolist()
    return Overhead(*(_figures(values) for values in (send, seen, gaps)))


def _figures(values_s: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(np.asarray(values_s) * 1e3, (50, 99))
    return {"p50_ms": float(p50), "p99_ms": float(p99), "max_ms": max(values_s) * 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=5.0)
    parser.add_argument("--num-requests", type=int, default=50)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    overhead = measure(arguments.rate, arguments.num_requests)
    rows = {"send": overhead.send, "token": overhead.token, "gap": overhead.gap}
    if arguments.json:
        print(json.dumps({"rate": arguments.rate, "num_requests": arguments.num_requests, **rows}))
        return
    for name, figures in rows.items():
        print(f"{name:6}", "  ".join(f"{key} {value:.3f}" for key, value in figures.items()))


if __name__ == "__main__":
    main()
