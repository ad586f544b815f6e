"""Many at once, some of whom leave."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

import pytest

from penstock import AsyncClient, RequestCancelledError
from tests.e2e.conftest import Oracle, Serving

NUM_REQUESTS = 200
CANCEL_SHARE = 0.2


@dataclass(frozen=True)
class Job:
    prompt: tuple[int, ...]
    num_tokens: int
    greedy: bool
    cancel_after: int | None


def jobs(seed: int) -> list[Job]:
    rng = random.Random(seed)
    made = []
    for i in range(NUM_REQUESTS):
        prompt = tuple(rng.randrange(8, 3000) for _ in range(rng.choice((3, 20, 60, 200, 400))))
        num_tokens = rng.randint(2, 32)
        cancelled = i < NUM_REQUESTS * CANCEL_SHARE
        made.append(Job(prompt, num_tokens, rng.random() < 0.5, rng.randrange(num_tokens) if cancelled else None))
    rng.shuffle(made)
    return made


async def run(client: AsyncClient, job: Job) -> tuple[int, ...] | None:
    """The tokens, or None of a request that was cancelled."""
    temperature = 0.0 if job.greedy else 1.0
    generation = client.generate(
        token_ids=job.prompt, max_tokens=job.num_tokens, temperature=temperature, seed=1, ignore_eos=True
    )
    if job.cancel_after == 0:
        await generation.aclose()
        return None
    try:
        async for _ in generation:
            if job.cancel_after is not None and len(generation.token_ids) >= job.cancel_after:
                await generation.aclose()
                return None
    except RequestCancelledError:
        assert job.cancel_after is not None
        return None
    return generation.token_ids


@pytest.mark.timeout(240)
@pytest.mark.anyio
async def test_of_200_requests_with_cancels_all_others_are_right(cluster: Serving, oracle: Oracle) -> None:
    todo = jobs(5)
    async with AsyncClient(cluster.grpc, timeout_s=200) as client:
        outputs = await asyncio.gather(*(run(client, job) for job in todo))
    assert sum(output is None for output in outputs) == NUM_REQUESTS * CANCEL_SHARE
    for job, output in zip(todo, outputs, strict=True):
        if output is not None:
            assert len(output) == job.num_tokens
            if job.greedy:
                oracle.check_greedy(job.prompt, output)
