"""Puts load on a server through the SDK and tells what its clients felt.

    report = await run_load("127.0.0.1:50051", jobs, Poisson(rate_per_s=4))
    print(report.summary().ttft_s.p99)

All times are those of the client: queueing, network and detokenization are in them. Nothing is retried, so that a
refusal shows as one.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from penstock import AsyncClient, AsyncGeneration, PenstockError, Stats

Clock = Callable[[], float]
Sleep = Callable[[float], Awaitable[None]]
Run = Callable[[int, float], Coroutine[None, None, None]]
"""Runs one job, given its index and when it was due."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request of a load: a text, or token ids where the number of prompt tokens must be exact."""

    prompt: str | Sequence[int]
    max_tokens: int
    temperature: float = 0.0
    ignore_eos: bool = True
    """Always write `max_tokens`, so that every run is of the same size."""

    def start(self, client: AsyncClient) -> AsyncGeneration:
        return client.generate(
            self.prompt if isinstance(self.prompt, str) else None,
            token_ids=None if isinstance(self.prompt, str) else self.prompt,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            ignore_eos=self.ignore_eos,
        )


def random_jobs(lengths: Iterable[tuple[int, int]], vocab_size: int, seed: int = 0) -> list[Job]:
    """A job of random token ids for each `(num_prompt_tokens, max_tokens)`: no two share a prefix but by chance."""
    draw = random.Random(seed)
    return [Job([draw.randrange(vocab_size) for _ in range(prompt)], output) for prompt, output in lengths]


@dataclass(frozen=True, slots=True)
class Concurrency:
    """A closed loop: as many requests at once, the next one starts when one has ended."""

    num_requests: int

    def __post_init__(self) -> None:
        if self.num_requests < 1:
            raise ValueError(f"concurrency: got {self.num_requests}, must be >= 1")

    async def drive(self, num_jobs: int, run: Run, now_s: Clock, sleep: Sleep) -> None:  # noqa: ARG002 (waits for none)
        """Run every job from 0 to `num_jobs`."""
        waiting = iter(range(num_jobs))

        async def run_one_after_another() -> None:
            for job in waiting:
                await run(job, now_s())

        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(self.num_requests, num_jobs)):
                tasks.create_task(run_one_after_another())


@dataclass(frozen=True, slots=True)
class Poisson:
    """An open loop: requests arrive at random, at this rate, whether the server keeps up or not."""

    rate_per_s: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.rate_per_s > 0 and math.isfinite(self.rate_per_s)):
            raise ValueError(f"rate_per_s: got {self.rate_per_s}, must be a finite number > 0")

    def arrivals_s(self) -> Iterator[float]:
        """Seconds after the start, without end; the first request comes at 0."""
        draw, now_s = random.Random(self.seed), 0.0
        while True:
            yield now_s
            now_s += draw.expovariate(self.rate_per_s)

    async def drive(self, num_jobs: int, run: Run, now_s: Clock, sleep: Sleep) -> None:
        """Run every job from 0 to `num_jobs`."""
        async with asyncio.TaskGroup() as tasks:
            for job, due_s in zip(range(num_jobs), self.arrivals_s(), strict=False):
                await sleep(max(0.0, due_s - now_s()))
                tasks.create_task(run(job, due_s))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one job came to. Times are in seconds after the start of the load.

    `start_s` of an open loop is when the job was due, not when this process got round to it, so that a server that
    slows down its load generator gains nothing by it. `deltas` are (time, number of tokens) of what came.
    """

    start_s: float
    end_s: float
    deltas: tuple[tuple[float, int], ...]
    num_prompt_tokens: int = 0
    error: PenstockError | None = None
    stats: Stats | None = None

    @property
    def num_output_tokens(self) -> int:
        return sum(num_tokens for _, num_tokens in self.deltas)

    @property
    def ttft_s(self) -> float | None:
        """Until the first token; None where none came."""
        return next((at_s - self.start_s for at_s, num_tokens in self.deltas if num_tokens), None)

    @property
    def itls_s(self) -> tuple[float, ...]:
        """The gap before each token but the first; 0 between tokens that came in one message."""
        at_s = [at_s for at_s, num_tokens in self.deltas for _ in range(num_tokens)]
        return tuple(later - earlier for earlier, later in itertools.pairwise(at_s))

    @property
    def tpot_s(self) -> float | None:
        """Mean of the gaps; None where there are none."""
        gaps = self.itls_s
        return sum(gaps) / len(gaps) if gaps else None

    @property
    def e2e_s(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of a sample, linear between neighbours (numpy's default); all None where the sample is empty."""

    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    max: float | None = None

    @classmethod
    def of(cls, sample: Iterable[float]) -> Percentiles:
        values = np.fromiter(sample, np.float64)
        if not values.size:
            return cls()
        p50, p90, p99 = np.percentile(values, (50, 90, 99))
        return cls(float(values.mean()), float(p50), float(p90), float(p99), float(values.max()))


@dataclass(frozen=True, slots=True)
class Summary:
    """`ttft_s`, `itl_s`, `tpot_s` and `e2e_s` are over the requests that ended well; the rest is in `errors` by code.

    Rates are over `duration_s`, from the first start to the last end; tokens of failed requests don't count.
    """

    num_requests: int
    num_failed: int
    errors: dict[str, int]
    duration_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    ttft_s: Percentiles
    itl_s: Percentiles
    tpot_s: Percentiles
    e2e_s: Percentiles


@dataclass(frozen=True, slots=True)
class Report:
    """Outcomes in the order of the jobs."""

    outcomes: tuple[Outcome, ...]

    def summary(self) -> Summary:
        done = [outcome for outcome in self.outcomes if outcome.error is None]
        errors = Counter(outcome.error.code for outcome in self.outcomes if outcome.error is not None)
        duration_s = 0.0
        if self.outcomes:
            duration_s = max(o.end_s for o in self.outcomes) - min(o.start_s for o in self.outcomes)
        num_output_tokens = sum(outcome.num_output_tokens for outcome in done)
        return Summary(
            num_requests=len(self.outcomes),
            num_failed=errors.total(),
            errors=dict(errors),
            duration_s=duration_s,
            num_prompt_tokens=sum(outcome.num_prompt_tokens for outcome in done),
            num_output_tokens=num_output_tokens,
            requests_per_s=len(done) / duration_s if duration_s else 0.0,
            output_tokens_per_s=num_output_tokens / duration_s if duration_s else 0.0,
            ttft_s=Percentiles.of(outcome.ttft_s for outcome in done if outcome.ttft_s is not None),
            itl_s=Percentiles.of(gap for outcome in done for gap in outcome.itls_s),
            tpot_s=Percentiles.of(outcome.tpot_s for outcome in done if outcome.tpot_s is not None),
            e2e_s=Percentiles.of(outcome.e2e_s for outcome in done),
        )


async def run_load(
    target: str,
    jobs: Sequence[Job],
    arrivals: Concurrency | Poisson,
    *,
    timeout_s: float = 600.0,
    clock: Clock = time.perf_counter,
    sleep: Sleep = asyncio.sleep,
) -> Report:
    """Run all jobs; an error of one is its outcome, and ends no other. `timeout_s` is for each.

    Raises `UnavailableError` where there is no server at all: it is asked first, which also makes the connection.
    """
    outcomes: dict[int, Outcome] = {}
    async with AsyncClient(target, timeout_s=timeout_s, max_retries=0) as client:
        await client.server_info()
        origin_s = clock()

        def now_s() -> float:
            return clock() - origin_s

        async def run(job: int, due_s: float) -> None:
            outcomes[job] = await _outcome(jobs[job], client, due_s, now_s)

        await arrivals.drive(len(jobs), run, now_s, sleep)
    return Report(tuple(outcomes[job] for job in range(len(jobs))))


async def _outcome(job: Job, client: AsyncClient, due_s: float, now_s: Clock) -> Outcome:
    deltas: list[tuple[float, int]] = []
    try:
        generation = job.start(client)
        async for delta in generation:
            deltas.append((now_s(), len(delta.token_ids)))  # noqa: PERF401 (what came before an error counts)
    except PenstockError as error:
        return Outcome(due_s, now_s(), tuple(deltas), error=error)
    num_prompt_tokens = generation.usage.num_prompt_tokens if generation.usage else 0
    return Outcome(due_s, now_s(), tuple(deltas), num_prompt_tokens, stats=generation.stats)
