"""How long a placement takes in a large cluster: every policy, 1,000 workers, 100,000 blocks known to be cached.

A decision is what the router does for one request: search, book the two workers, put them in their new places. Between
decisions, untimed, as many requests end as come, and workers report; so every decision meets another fleet.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.rows import Row
from core.block_hash import block_hash, root_hash
from core.messages import CacheChanged, WorkerRole
from router.policies import make_policy
from router.policies.fleet import Fleet, KindKey
from router.policies.model import CacheKind, Need, Placement, Tuning
from router.policies.place import place

POLICIES = ("round_robin", "least_loaded", "power_of_two", "prefix_aware", "slo_aware", "cost_aware", "mixed_pool")
NUM_WORKERS, NUM_BLOCKS = 1000, 100_000
NUM_READING, NUM_WRITING = 600, 6000
"""Prompts and answers that are under way."""
PROMPT_BLOCKS, BLOCK_SIZE = 128, 16
NUM_PREFIXES = 400
"""Shared beginnings of prompts. Each is cached, whole or in part, by some workers, a few of them by many."""
CACHE: CacheKind = ("model float32 float32", BLOCK_SIZE)
DEVICES = ("fast", "slow")
MAX_S = 50e-6


@dataclass(slots=True)
class World:
    """A fleet, the prompts that come to it, and what is under way."""

    fleet: Fleet
    prompts: list[list[bytes]]
    rng: random.Random
    names: list[str]
    reading: deque[str] = field(default_factory=deque)
    writing: deque[str] = field(default_factory=deque)
    num_reading: Counter[str] = field(default_factory=Counter)
    num_writing: Counter[str] = field(default_factory=Counter)

    def need(self) -> Need:
        hashes = self.prompts[int(self.rng.random() ** 2 * len(self.prompts))]  # some are asked more often
        num_tokens = PROMPT_BLOCKS * BLOCK_SIZE + 1
        return Need(num_tokens, num_tokens + 256, hashes={CACHE: hashes}, ttft_s=5.0, itl_s=0.05)

    def take(self, prefill: str, decode: str) -> None:
        self.reading.append(prefill)
        self.writing.append(decode)
        self.num_reading[prefill] += 1
        self.num_writing[decode] += 1
        self._book(prefill)
        self._book(decode)
        self.fleet.settle()

    def _book(self, name: str) -> None:
        reading, writing = self.num_reading[name], self.num_writing[name]
        self.fleet.book(
            name,
            used_credits=reading + writing,
            pending_tokens=PROMPT_BLOCKS * BLOCK_SIZE * reading,
            pending_blocks=(PROMPT_BLOCKS + 1) * writing,
        )

    def go_on(self) -> None:
        """Prompts are read, answers end, some workers say how they are."""
        while len(self.reading) > NUM_READING:
            name = self.reading.popleft()
            self.num_reading[name] -= 1
            self._book(name)
        while len(self.writing) > NUM_WRITING:
            name = self.writing.popleft()
            self.num_writing[name] -= 1
            self._book(name)
        for name in self.rng.sample(self.names, 4):
            active = self.num_writing[name]
            self.fleet.report(name, num_free_blocks=8192, num_active=active, num_waiting_tokens=0)
        self.fleet.settle()


def fleet_of(num_workers: int) -> Fleet:
    """A third reads, two thirds write, but for one in ten that does both; two kinds of hardware; all pairs up."""
    fleet = Fleet(2 * NUM_BLOCKS)
    names: dict[WorkerRole, list[str]] = {role: [] for role in WorkerRole}
    for i in range(num_workers):
        role = WorkerRole.MIXED if i % 10 == 9 else WorkerRole.PREFILL if i % 3 == 0 else WorkerRole.DECODE
        name = f"{role.value}-{i}"
        fleet.add(name, KindKey(role, DEVICES[i % 2], CACHE, 32_768, runs_alone=True), 64, 8192)
        names[role].append(name)
    for prefill in names[WorkerRole.PREFILL] + names[WorkerRole.MIXED]:
        for decode in names[WorkerRole.DECODE] + names[WorkerRole.MIXED]:
            if prefill != decode:
                fleet.pair_up(prefill, decode, 1)
    for kind in fleet.kinds.values():
        if kind.key.device == "slow":
            for tokens in (128, 2048, 512, 1024):
                kind.prefill.observe(tokens, 0.01 + 3e-4 * tokens)
    return fleet


def fill_caches(fleet: Fleet, rng: random.Random, num_blocks: int) -> list[list[bytes]]:
    """Prompts, and their blocks in the caches of workers: `num_blocks` different ones are known in the end."""
    names, prompts = [*fleet.workers], []
    for name in names:
        fleet.tell(name, CacheChanged(cleared=True))
    for i in range(NUM_PREFIXES):
        parent, chain = root_hash(CACHE[0], str(i)), []
        for _ in range(PROMPT_BLOCKS):
            parent = block_hash(parent, range(BLOCK_SIZE))
            chain.append(parent)
        prompts.append(chain)
        for name in rng.sample(names, 300 if i < 10 else 6):
            fleet.tell(name, CacheChanged(tuple(chain[: rng.randint(PROMPT_BLOCKS // 4, PROMPT_BLOCKS)])))
    others = iter(range(10**9))
    while len(fleet.caches) < num_blocks:
        unique = tuple(next(others).to_bytes(32, "little") for _ in range(64))
        fleet.tell(rng.choice(names), CacheChanged(unique[: num_blocks - len(fleet.caches)]))
    return prompts


def decisions_s(name: str, num_decisions: int) -> tuple[list[float], int]:
    """CPU seconds of each decision, and how many found some of the prompt cached."""
    rng = random.Random(1)
    fleet = fleet_of(NUM_WORKERS)
    world = World(fleet, fill_caches(fleet, rng, NUM_BLOCKS), rng, [*fleet.workers])
    policy = make_policy(name, Tuning(device_prices={"fast": 4.0, "slow": 1.0}))
    taken, num_hits = [], 0
    gc.collect()
    gc.freeze()
    for i in range(num_decisions + NUM_WRITING):
        need = world.need()
        started_at = time.thread_time()
        placement = place(policy, need, fleet, rng)
        assert isinstance(placement, Placement)
        world.take(placement.route.prefill, placement.route.decode)
        took_s = time.thread_time() - started_at
        world.go_on()
        if i >= NUM_WRITING:
            taken.append(took_s)
            num_hits += placement.forecast.num_cached_prefill + placement.forecast.num_cached_decode > 0
    gc.unfreeze()
    return taken, num_hits


def row_of(name: str, taken: Sequence[float], num_hits: int) -> Row:
    p50_s, p99_s = statistics.median(taken), statistics.quantiles(taken, n=100)[98]
    detail = (
        f"p50 {1e6 * p50_s:.1f} us, mean {1e6 * statistics.fmean(taken):.1f}, p99 {1e6 * p99_s:.1f}; "
        f"at most {1e6 * MAX_S:.0f} us at the median; "
        f"{100 * num_hits / len(taken):.0f} % found some of the prompt cached"
    )
    return Row.of(f"decision, {name}", 1 / p50_s, "1/s", 1 / MAX_S, detail=detail)


def placement_rows(num_decisions: int) -> list[Row]:
    """A row for each policy."""
    return [row_of(name, *decisions_s(name, num_decisions)) for name in POLICIES]
