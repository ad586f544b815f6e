"""How long streams stand still after `kill -9` of the decode worker that writes them.

One prefill and two decode workers as processes of this machine. Requests run on both decode workers; the one with more
of them is killed. Beside the longest gap that any of its streams shows stands the time that the survivors need to read
again, at once, what those streams had come to: that much is not the recovery's doing.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.rows import Row
from cluster.cluster import Cluster
from cluster.config import ClusterConfig, PoolConfig
from engine.config import EngineConfig
from penstock import Client
from router.config import PlacementConfig, RouterConfig

MODEL = Path(__file__).resolve().parent.parent / "models" / "penstock-tiny"
NUM_STREAMS = 32
"""Half of them on each decode worker."""
NUM_TOKENS, KILL_AFTER = 400, 20
TARGET_S = 2.0


@dataclass(slots=True)
class Stream:
    """Tokens of one request, and when each came."""

    prompt: tuple[int, ...]
    token_ids: tuple[int, ...] = ()
    times: list[float] = field(default_factory=list)
    num_attempts: int = 0

    def longest_gap(self) -> tuple[float, int]:
        """The longest time between two tokens, in seconds, and how many had come before it."""
        gaps = [later - earlier for earlier, later in itertools.pairwise(self.times)]
        longest_s = max(gaps)
        return longest_s, gaps.index(longest_s) + 1


def prompts(num_prompts: int, num_tokens: int) -> list[tuple[int, ...]]:
    return [tuple((31 * i + 7 * j + j * j) % 2900 + 10 for j in range(num_tokens)) for i in range(num_prompts)]


def read(client: Client, stream: Stream, max_tokens: int, begun: threading.Semaphore) -> None:
    """Read a stream to its end, and say when `KILL_AFTER` tokens have come."""
    generation = client.generate(
        token_ids=stream.prompt, max_tokens=max_tokens, temperature=1.0, seed=len(stream.prompt), ignore_eos=True
    )
    told = False
    for delta in generation:
        stream.times += [time.monotonic()] * len(delta.token_ids)
        if not told and len(stream.times) >= min(KILL_AFTER, max_tokens):
            told = True
            begun.release()
    stream.token_ids = generation.token_ids
    stream.num_attempts = generation.stats.num_attempts if generation.stats else 0


def read_all(client: Client, given: Sequence[tuple[int, ...]], max_tokens: int, victim: int | None) -> list[Stream]:
    """All at once; with a `victim`, that process is killed once all have begun."""
    streams, begun = [Stream(prompt) for prompt in given], threading.Semaphore(0)
    with ThreadPoolExecutor(len(streams)) as threads:
        reading = [threads.submit(read, client, stream, max_tokens, begun) for stream in streams]
        if victim is not None:
            for _ in streams:
                begun.acquire()
            os.kill(victim, signal.SIGKILL)
        for each in reading:
            each.result()
    return streams


def recovery_rows() -> list[Row]:
    """Two rows: the gap, and the share of streams that are those of an undisturbed run."""
    config = ClusterConfig(
        model=MODEL,
        launcher="subprocess",
        log_level="error",
        decode=PoolConfig(num_workers=2),
        engine=EngineConfig(num_threads=1, device="cpu"),
        router=RouterConfig(grpc_port=0, http_port=0, placement=PlacementConfig(disaggregate="require")),
    )
    given = prompts(NUM_STREAMS, 64)
    with Cluster(config) as cluster, Client(cluster.endpoints.grpc, timeout_s=300) as client:
        undisturbed = read_all(client, given, NUM_TOKENS, None)
        killed = read_all(client, given, NUM_TOKENS, cluster.launcher.pids()["decode-0"])
        resumed = [stream for stream in killed if stream.num_attempts > 1]
        gaps = [stream.longest_gap() for stream in resumed]
        again = [stream.prompt + stream.token_ids[:come] for stream, (_, come) in zip(resumed, gaps, strict=True)]
        started_at = time.monotonic()
        reread_s = max(stream.times[0] for stream in read_all(client, again, 1, None)) - started_at
    longest_s = max(gap_s for gap_s, _ in gaps)
    num_right = sum(a.token_ids == b.token_ids for a, b in zip(killed, undisturbed, strict=True))
    detail = (
        f"{len(resumed)} streams of {NUM_STREAMS} went on elsewhere; longest gap {longest_s:.2f} s, of which reading "
        f"{sum(map(len, again))} tokens again takes {reread_s:.2f} s; at most {TARGET_S:g} s besides"
    )
    return [
        Row.of(
            "kill -9 of a decode worker, inverse of the longest gap but for reading again",
            1 / max(longest_s - reread_s, 1e-3),
            "1/s",
            1 / TARGET_S,
            detail=detail,
        ),
        Row.of("streams identical to the undisturbed run", num_right / NUM_STREAMS, "of 1", 1.0),
    ]
