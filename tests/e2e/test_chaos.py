"""Requests of every kind for minutes, while workers are cut off, lied to, delayed, frozen and killed.

Not in the default suite: `make chaos`. PENSTOCK_CHAOS_S says how long, PENSTOCK_CHAOS_SEED which requests and faults; K
and V go through shared memory with an odd seed, over TCP with an even one. Streams of a router that is killed are taken
up again by the SDK.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pytest

from cluster.steps import Step
from penstock import AsyncClient, DeadlineExceededError, PenstockError, RequestCancelledError, UnavailableError
from tests.faults.control import QUICK, Action, World, world
from tests.faults.jobs import Answer, all_kinds, answer_of, run
from tests.faults.network import Way

DURATION_S = float(os.environ.get("PENSTOCK_CHAOS_S", "600"))
SEED = int(os.environ.get("PENSTOCK_CHAOS_SEED", "1"))
NUM_CLIENTS, NUM_JOBS = 8, 64
MAX_RETRIES = 20
"""Of a stream whose router is killed, until there is another."""
FAULT_INTERVAL_S, KILL_INTERVAL_S = 3.0, 30.0
LONGEST_S = 90.0
"""No stream may take longer, whatever happens to it."""
WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")
BACK_S = 15.0
"""A worker that was killed is back by then."""
Fault = Action | Literal["cancel", "weather"]
FAULTS: tuple[Fault, ...] = ("cancel", "damage", "cut", "sleep", "nap", "weather")
WAYS: tuple[Way, ...] = ("session", "kv")
WHATS: tuple[Literal["open", "held", "cut"], ...] = ("open", "held", "cut")
STEPS = {
    "prefill": (Step.PREFILL, Step.PUSH, Step.COMMIT, Step.RELEASE),
    "decode": (Step.RESERVE, Step.ACCEPT, Step.TOKENS),
}


@dataclass
class Run:
    """What is going on, and what came of it."""

    world: World
    jobs: Sequence[Mapping[str, Any]]
    undisturbed: Sequence[Answer]
    until: float
    counts: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    failures: list[tuple[float, float, str]] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    cancelled: set[str] = field(default_factory=set)
    away: list[tuple[str, float, float]] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    lives: dict[str, set[str]] = field(default_factory=dict)

    def no_capacity(self, start: float, end: float) -> bool:
        """Whether there was a moment without any worker of a role."""
        for role in STEPS:
            spans = [(name, a, b) for name, a, b in self.away if name.startswith(role) and a < end and start < b]
            if any(x[0] != y[0] and x[1] < y[2] and y[1] < x[2] for x in spans for y in spans):
                return True
        return False


@pytest.fixture
def going() -> Iterator[Run]:
    jobs = all_kinds(SEED, NUM_JOBS)
    transfer = QUICK if SEED % 2 else replace(QUICK, backend="tcp", connect_timeout_s=2.0)
    with world(max_attempts=20, transfer=transfer, proxied=True) as made, made.client() as client:
        undisturbed = [answer for job in jobs if isinstance(answer := run(client, job), Answer)]
        assert len(undisturbed) == NUM_JOBS
        yield Run(made, jobs, undisturbed, time.monotonic() + DURATION_S)


def client_of(going: Run) -> AsyncClient:
    return AsyncClient(going.world.target, timeout_s=LONGEST_S, max_retries=MAX_RETRIES, wait_for_ready=True)


async def ask(going: Run, rng: random.Random) -> None:
    """One client: a request after the other, of which it leaves some before their end."""
    async with client_of(going) as client:
        while time.monotonic() < going.until:
            which = rng.randrange(NUM_JOBS)
            leave_after = rng.randint(0, 20) if rng.random() < 0.1 else None
            name, started_at = f"{rng.getrandbits(64):x}", time.monotonic()
            generation = client.generate(**going.jobs[which], request_id=name)
            going.running.add(name)
            deltas = []
            try:
                async for delta in generation:
                    deltas.append(delta)
                    if leave_after is not None and len(generation.token_ids) >= leave_after:
                        break
            except RequestCancelledError:
                going.counts["cancelled" if name in going.cancelled else "cancelled_unasked"] += 1
                continue
            except PenstockError as error:
                going.failures.append((started_at, time.monotonic(), f"{error.code}: {error}"))
                continue
            finally:
                going.running.discard(name)
            expected = going.undisturbed[which]
            if generation.finish_reason is None:
                await generation.aclose()
                going.counts["left"] += 1
                right = generation.token_ids == expected.token_ids[: len(generation.token_ids)]
            else:
                going.counts["done"] += 1
                going.counts["resumed"] += generation.stats is not None and generation.stats.num_attempts > 1
                right = answer_of(generation, deltas) == expected
            if not right:
                going.wrong.append(f"{going.jobs[which]}: {generation.token_ids}, expected {expected.token_ids}")


async def disturb(going: Run, rng: random.Random) -> None:
    """A cheap fault every 3 s, and a kill every 30: the pace is what is being set here."""
    kill_at = time.monotonic() + KILL_INTERVAL_S / 2
    async with client_of(going) as client:
        while time.monotonic() < going.until:
            await asyncio.sleep(FAULT_INTERVAL_S)
            if time.monotonic() >= kill_at:
                kill_at += KILL_INTERVAL_S
                kill(going, rng)
            fault = rng.choice(FAULTS)
            if fault == "cancel":
                if going.running:
                    name = rng.choice(sorted(going.running))
                    going.cancelled.add(name)
                    with contextlib.suppress(UnavailableError, DeadlineExceededError):  # the router is down
                        going.faults["cancel"] += await client.cancel(name)
                continue
            with contextlib.suppress(AssertionError, IndexError, OSError, queue.Empty):  # it is down
                if fault == "weather":
                    await asyncio.to_thread(change_weather, going, rng)
                else:
                    await asyncio.to_thread(arm, going, rng, fault)
                going.faults[fault] += 1


def kill(going: Run, rng: random.Random) -> None:
    """One worker, or now and then both of a pair, or the router."""
    both = ["prefill-0", rng.choice(WORKERS[2:])]
    victims = rng.choice(([rng.choice(WORKERS)], [rng.choice(WORKERS)], both, ["router"]))
    for victim in victims:
        with contextlib.suppress(KeyError, ProcessLookupError):  # it is down
            going.world.kill(victim)
            going.faults["kill a router" if victim == "router" else "kill"] += 1
            going.kills[victim] += 1
            going.away.append((victim, time.monotonic(), time.monotonic() + BACK_S))


async def watch(going: Run) -> None:
    """Which lives of workers there are: one that finds its books wrong ends itself, and is started anew."""
    async with client_of(going) as client:
        while time.monotonic() < going.until:
            with contextlib.suppress(UnavailableError, DeadlineExceededError):  # the router is down
                for worker in (await client.server_info()).workers:
                    going.lives.setdefault(worker.worker_id, set()).add(worker.incarnation)
            await asyncio.sleep(0.5)


def here(going: Run, names: Sequence[str]) -> list[str]:
    return [name for name in names if name in going.world.steps.are_here()]


def change_weather(going: Run, rng: random.Random) -> None:
    """For a while a worker's way to the router, or to its pairs, is slow, silent or cut."""
    victim, way, what = rng.choice(here(going, WORKERS)), rng.choice(WAYS), rng.choice(WHATS)
    if what != "open":
        going.away.append((victim, time.monotonic(), time.monotonic() + BACK_S))
    going.world.steps.weather(victim, way, what, delay_s=0.005, jitter_s=0.05)
    time.sleep(rng.choice((0.1, 1.0, 2.0)))
    going.world.steps.weather(victim, way)


def arm(going: Run, rng: random.Random, fault: Action) -> None:
    anywhere = fault in ("sleep", "nap")
    victim = rng.choice(here(going, WORKERS if anywhere else WORKERS[:2]))
    step = rng.choice(STEPS[victim.partition("-")[0]]) if anywhere else Step.PUSH
    layer, seconds = rng.randrange(6) if step is Step.PUSH else 0, rng.choice((0.3, 1.0, 4.0))  # a lease is 2 s
    going.world.steps.arm(victim, step, fault, layer, seconds)
    if anywhere:
        going.away.append((victim, time.monotonic(), time.monotonic() + FAULT_INTERVAL_S + 2 * seconds))


@pytest.mark.chaos
@pytest.mark.timeout(DURATION_S + 400)
@pytest.mark.anyio
async def test_every_stream_is_the_undisturbed_one_while_workers_fail(going: Run) -> None:
    clients = [ask(going, random.Random(f"{SEED}-{i}")) for i in range(NUM_CLIENTS)]
    tasks = [asyncio.create_task(each) for each in (*clients, disturb(going, random.Random(SEED)), watch(going))]
    _, hung = await asyncio.wait(tasks, timeout=DURATION_S + LONGEST_S)
    for task in hung:
        task.cancel()
    unexcused = [text for start, end, text in going.failures if not going.no_capacity(start, end)]
    print(f"\nseed {SEED}, {DURATION_S:g} s: {dict(going.counts)}, faults {dict(going.faults)}")
    unasked = {name: len(lives) - 1 - going.kills[name] for name, lives in going.lives.items()}
    print(f"workers that ended without being killed: {sum(max(0, number) for number in unasked.values())}")
    print(f"wrong {len(going.wrong)}, hung {len(hung)}, failed {len(going.failures)}, unexcused {len(unexcused)}")
    assert not hung, "streams hang"
    for task in tasks:
        await task
    assert not going.wrong
    assert max(unasked.values()) <= 0, f"workers ended themselves: {unasked}"
    assert not unexcused
    assert not going.counts["cancelled_unasked"]
    assert going.counts["done"] > 0
    await asyncio.to_thread(going.world.wait_until_whole, 60.0)
