"""`penstock demo`: one prompt through a cluster of its own, and where the time went."""

from __future__ import annotations

import itertools
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from cluster.cluster import Cluster
from cluster.config import ClusterConfig
from core.errors import UnavailableError
from penstock import Client
from penstock.errors import PenstockError as ClientError
from penstock.types import Stats
from router.config import PlacementConfig, RouterConfig

if TYPE_CHECKING:
    from cluster.cli import Demo

TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Report:
    """What the demo measured. TTFT and ITL are the client's; `overlap_ratio` is the share of the transfer that was
    hidden behind compute."""

    ttft_s: float
    itl_p50_s: float | None
    itl_p99_s: float | None
    tokens_per_s: float
    kv_bytes: int | None
    overlap_ratio: float | None
    startup_s: float
    first_token_s: float
    text: str
    num_tokens: int
    finish_reason: str
    prefill_worker: str
    decode_worker: str


def demo(command: Demo) -> int:
    """Run it; the exit code. Raises PenstockError."""
    started_at = time.monotonic()
    console = Console(stderr=True, quiet=command.json)
    config = ClusterConfig(
        model=command.model,
        launcher=command.launcher,
        router=RouterConfig(grpc_port=0, http_port=0, placement=PlacementConfig(disaggregate="require")),
    )
    console.print(
        f"Starting a router, a prefill worker and a decode worker ({command.launcher}) for [b]{config.model_name}[/b]"
    )
    with Cluster(config) as cluster:
        startup_s = time.monotonic() - started_at
        console.print(f"Serving after {startup_s:.1f} s. Prompt and completion:\n")
        report = generate(command, cluster.endpoints.grpc, startup_s)
    if command.json:
        print(json.dumps(asdict(report)))
    else:
        print_table(console, report)
    return 0


def generate(command: Demo, target: str, startup_s: float) -> Report:
    """One request through the SDK, its text streamed to the terminal."""
    echo = None if command.json else sys.stdout
    if echo:
        print(command.prompt, end="", flush=True, file=echo)
    arrivals: list[tuple[float, int]] = []
    texts: list[str] = []
    try:
        with Client(target, timeout_s=TIMEOUT_S) as client:
            sent_at = time.monotonic()
            generation = client.generate(
                command.prompt, max_tokens=command.max_tokens, temperature=command.temperature, seed=command.seed
            )
            for delta in generation:
                arrivals.append((time.monotonic(), len(delta.token_ids)))
                texts.append(delta.text)
                if echo:
                    print(delta.text, end="", flush=True, file=echo)
    except ClientError as error:
        raise UnavailableError(f"the demo's request failed: {error}") from error
    if echo:
        print("\n", file=echo)
    return make_report(
        arrivals, sent_at, startup_s, "".join(texts), str(generation.finish_reason), generation.stats or Stats()
    )


def make_report(
    arrivals: list[tuple[float, int]], sent_at: float, startup_s: float, text: str, finish_reason: str, stats: Stats
) -> Report:
    """`arrivals`: when each delta came and how many tokens were in it; those of one delta have no gap between them."""
    times = [at for at, num_tokens in arrivals for _ in range(num_tokens)]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    ttft_s = times[0] - sent_at
    return Report(
        ttft_s=ttft_s,
        itl_p50_s=float(np.percentile(gaps, 50)) if gaps else None,
        itl_p99_s=float(np.percentile(gaps, 99)) if gaps else None,
        tokens_per_s=len(times) / (times[-1] - sent_at),
        kv_bytes=stats.kv_bytes,
        overlap_ratio=stats.overlap_ratio,
        startup_s=startup_s,
        first_token_s=startup_s + ttft_s,
        text=text,
        num_tokens=len(times),
        finish_reason=finish_reason,
        prefill_worker=stats.prefill_worker,
        decode_worker=stats.decode_worker,
    )


def print_table(console: Console, report: Report) -> None:
    def ms(seconds: float | None) -> str:
        return "-" if seconds is None else f"{seconds * 1e3:.1f} ms"

    table = Table(title="What happened", title_justify="left", show_header=False)
    kv = "-" if report.kv_bytes is None else f"{report.kv_bytes / 1024:.1f} KiB"
    hidden = "-" if report.overlap_ratio is None else f"{report.overlap_ratio:.0%}"
    for name, value in (
        ("Time to first token (TTFT)", ms(report.ttft_s)),
        ("Inter-token latency (ITL), p50", ms(report.itl_p50_s)),
        ("Inter-token latency (ITL), p99", ms(report.itl_p99_s)),
        ("Tokens", f"{report.num_tokens} ({report.finish_reason})"),
        ("Tokens per second", f"{report.tokens_per_s:.1f}"),
        ("KV carried from prefill to decode", kv),
        ("Transfer hidden behind compute", hidden),
        ("Prefill worker", report.prefill_worker),
        ("Decode worker", report.decode_worker),
        ("Start-up", f"{report.startup_s:.1f} s"),
    ):
        table.add_row(name, value)
    console.print(table)
