"""Requests for minutes, while workers are killed and frozen: every answer right, nothing held at the end.

Not in the default suite: `scripts/test -m chaos`. PENSTOCK_SOAK_S and PENSTOCK_SOAK_SEED: how long, and which faults.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from penstock import AsyncClient, PenstockError
from tests.e2e.conftest import Oracle, Serving, start, stop

DURATION_S = float(os.environ.get("PENSTOCK_SOAK_S", "240"))
SEED = int(os.environ.get("PENSTOCK_SOAK_SEED", "1"))
NUM_CLIENTS = 8
WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")
FROZEN_S = 8.0
"""Longer than a lease and than any silence that is forgiven."""

Answer = tuple[tuple[int, ...], tuple[int, ...]]


@pytest.fixture
def four_workers() -> Iterator[Serving]:
    pools = ["--prefill.num-workers", "2", "--decode.num-workers", "2", "--num-threads", "1"]
    serving = start("--launcher", "subprocess", "--router.dispatch.max-attempts", "6", *pools)
    try:
        yield serving
        left = stop(serving)
    finally:
        serving.process.kill()
    assert left == []


async def one_client(target: str, seed: int, until: float, outcomes: Counter[str], answers: list[Answer]) -> None:
    rng = random.Random(seed)
    async with AsyncClient(target, timeout_s=90) as client:
        while time.monotonic() < until:
            prompt = tuple(rng.randrange(8, 3000) for _ in range(rng.choice((4, 40, 300, 900))))
            generation = client.generate(
                token_ids=prompt, max_tokens=rng.randint(2, 120), temperature=0, ignore_eos=True
            )
            leave_after = rng.randint(0, 20) if rng.random() < 0.2 else None
            try:
                async for _ in generation:
                    if leave_after is not None and len(generation.token_ids) >= leave_after:
                        break
            except PenstockError as error:
                outcomes[error.code] += 1
                continue
            await generation.aclose()
            outcomes["left" if leave_after is not None else "done"] += 1
            answers.append((prompt, generation.token_ids))


async def faults(serving: Serving, until: float, outcomes: Counter[str]) -> None:
    rng = random.Random(SEED)
    while time.monotonic() < until:
        await asyncio.sleep(rng.uniform(4, 10))  # the pace of the faults is what is being set here
        victim = rng.choice(WORKERS)
        with contextlib.suppress(LookupError, ProcessLookupError):  # it is down already
            pid = await asyncio.to_thread(serving.pid, victim)
            if rng.random() < 0.5:
                os.kill(pid, signal.SIGKILL)
                outcomes["kills"] += 1
            else:
                os.kill(pid, signal.SIGSTOP)
                outcomes["freezes"] += 1
                await asyncio.sleep(FROZEN_S)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)


@pytest.mark.chaos
@pytest.mark.timeout(DURATION_S + 300)
@pytest.mark.anyio
async def test_every_answer_is_right_while_workers_die_and_freeze(four_workers: Serving, oracle: Oracle) -> None:
    until = time.monotonic() + DURATION_S
    outcomes: Counter[str] = Counter()
    answers: list[Answer] = []
    clients = (one_client(four_workers.grpc, SEED * 100 + i, until, outcomes, answers) for i in range(NUM_CLIENTS))
    await asyncio.gather(*clients, faults(four_workers, until, outcomes))
    print(f"seed {SEED}: {dict(outcomes)}")
    four_workers.wait_until(lambda info: sum(w.connected for w in info.workers) == len(WORKERS), timeout_s=60)
    four_workers.wait_until_nothing_is_held()
    for prompt, output in answers:
        if output:
            oracle.check_greedy(prompt, output)
    assert outcomes["done"] > 0
    assert outcomes.keys() <= {"done", "left", "kills", "freezes"}, f"clients saw failures: {outcomes}"
