"""The load helper: what it measures, pure, and that it really sends what it says."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from benchmarks.load import Concurrency, Job, Outcome, Percentiles, Poisson, Report, random_jobs, run_load
from penstock import OverloadedError, UnavailableError
from penstock.v1 import inference_pb2 as pb
from tests.client.fake_server import DEADLINE_S, FakeServer, delta, finished, refuses, says, started, streams


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    yield fake
    fake.stop()


def test_times_run_from_when_a_job_was_due() -> None:
    outcome = Outcome(start_s=10.0, end_s=13.5, deltas=((11.0, 1), (11.5, 1), (13.0, 1)))
    assert (outcome.ttft_s, outcome.e2e_s, outcome.tpot_s) == (1.0, 3.5, 1.0)
    assert outcome.itls_s == (0.5, 1.5)


def test_tokens_of_one_message_have_no_gap_between_them() -> None:
    outcome = Outcome(0.0, 3.0, ((1.0, 2), (2.0, 3)))
    assert outcome.num_output_tokens == 5
    assert outcome.itls_s == (0.0, 1.0, 0.0, 0.0)


def test_text_that_comes_late_is_no_token() -> None:
    assert Outcome(0.0, 3.0, ((1.0, 0), (2.0, 1), (3.0, 0))).ttft_s == 2.0
    assert Outcome(0.0, 3.0, ((2.0, 1), (3.0, 0))).itls_s == ()


def test_no_token_means_no_latency_of_tokens() -> None:
    outcome = Outcome(0.0, 1.0, ())
    assert (outcome.ttft_s, outcome.tpot_s, outcome.itls_s) == (None, None, ())


def test_percentiles_are_linear_between_neighbours() -> None:
    percentiles = Percentiles.of(float(n) for n in range(101))
    assert percentiles == Percentiles(mean=50.0, p50=50.0, p90=90.0, p99=99.0, max=100.0)
    assert Percentiles.of([1.0, 2.0]).p50 == 1.5


def test_percentiles_of_nothing_are_none() -> None:
    assert Percentiles.of([]) == Percentiles(None, None, None, None, None)


def test_summary_counts_failures_apart() -> None:
    good = Outcome(0.0, 2.0, ((1.0, 1), (2.0, 1)), num_prompt_tokens=7)
    refused = Outcome(1.0, 4.0, ((1.5, 1),), error=OverloadedError("full"))
    summary = Report((good, refused, refused)).summary()
    assert (summary.num_requests, summary.num_failed, summary.errors) == (3, 2, {"RESOURCE_EXHAUSTED": 2})
    assert (summary.duration_s, summary.requests_per_s, summary.output_tokens_per_s) == (4.0, 0.25, 0.5)
    assert (summary.num_prompt_tokens, summary.num_output_tokens) == (7, 2)
    assert (summary.ttft_s.max, summary.itl_s.max, summary.tpot_s.max, summary.e2e_s.max) == (1.0, 1.0, 1.0, 2.0)


def test_itl_is_over_all_gaps_not_over_requests() -> None:
    short = Outcome(0.0, 9.0, ((0.0, 1), (9.0, 1)))
    long = Outcome(0.0, 9.0, tuple((float(n), 1) for n in range(9)))
    assert Report((short, long)).summary().itl_s.mean == pytest.approx((9.0 + 8 * 1.0) / 9)


def test_summary_of_nothing_is_all_zero_and_fit_for_json() -> None:
    summary = Report(()).summary()
    assert summary.requests_per_s == 0.0
    assert json.loads(json.dumps(dataclasses.asdict(summary)))["ttft_s"]["p99"] is None


def test_poisson_arrivals_begin_at_once_and_keep_their_rate() -> None:
    arrivals = list(itertools.islice(Poisson(rate_per_s=5.0).arrivals_s(), 20_001))
    assert arrivals[0] == 0.0
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] / 20_000 == pytest.approx(0.2, rel=0.05)


def test_poisson_arrivals_are_those_of_the_seed() -> None:
    def first(seed: int) -> list[float]:
        return list(itertools.islice(Poisson(5.0, seed).arrivals_s(), 10))

    assert first(1) == first(1) != first(2)


def test_random_jobs_have_the_lengths_asked_for_and_are_those_of_the_seed() -> None:
    lengths = [(3, 5), (0, 1), (200, 7)]
    jobs = random_jobs(lengths, vocab_size=10, seed=4)
    assert [(len(job.prompt), job.max_tokens) for job in jobs] == lengths
    assert set(jobs[2].prompt) <= set(range(10))
    assert jobs == random_jobs(lengths, vocab_size=10, seed=4) != random_jobs(lengths, vocab_size=10, seed=5)


@pytest.mark.parametrize("arrivals", [lambda: Concurrency(0), lambda: Poisson(0.0), lambda: Poisson(float("inf"))])
def test_a_load_that_never_comes_is_refused(arrivals: Any) -> None:
    with pytest.raises(ValueError, match="must be"):
        arrivals()


@pytest.mark.anyio
async def test_load_tells_times_tokens_and_errors_of_each_job(server: FakeServer) -> None:
    server.play(
        streams(started(), delta("", 1), delta("ab", 2, 3), finished(3, kv_bytes=64)),
        refuses(grpc.StatusCode.RESOURCE_EXHAUSTED, "full"),
        says("x"),
    )
    jobs = [Job("a", 3), Job([1, 2], 4), Job("c", 1, ignore_eos=False)]
    good, refused, last = (await run_load(server.target, jobs, Concurrency(1))).outcomes
    assert [num_tokens for _, num_tokens in good.deltas] == [1, 2]
    assert good.start_s < good.deltas[0][0] <= good.deltas[1][0] <= good.end_s <= refused.start_s
    assert good.num_prompt_tokens == 3
    assert good.stats is not None
    assert good.stats.kv_bytes == 64
    assert isinstance(refused.error, OverloadedError)
    assert last.error is None
    assert [request.WhichOneof("input") for request in server.requests] == ["prompt", "token_ids", "prompt"]
    assert server.requests[1].sampling == pb.SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)


@pytest.mark.anyio
async def test_closed_loop_keeps_as_many_in_flight_as_it_says(server: FakeServer) -> None:
    together = threading.Barrier(3)

    def script(request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
        together.wait(DEADLINE_S)  # ends only if three are here at once
        yield from says("x")(request, context)

    server.play(*[script] * 6)
    report = await run_load(server.target, [Job(str(n), 1) for n in range(6)], Concurrency(3))
    assert report.summary().num_failed == 0
    changes = sorted([(o.start_s, 1) for o in report.outcomes] + [(o.end_s, -1) for o in report.outcomes])
    assert max(itertools.accumulate(change for _, change in changes)) == 3


@pytest.mark.anyio
async def test_open_loop_sends_on_time_though_nothing_is_answered_yet(server: FakeServer) -> None:
    answer = threading.Event()
    slept_s: list[float] = []

    def script(request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
        if len(server.requests) == 4:
            answer.set()
        answer.wait(DEADLINE_S)
        yield from says("x")(request, context)

    async def sleep(delay_s: float) -> None:
        slept_s.append(delay_s)
        await asyncio.sleep(0)

    server.play(*[script] * 4)
    arrivals = Poisson(rate_per_s=0.01)
    jobs = [Job(str(n), 1) for n in range(4)]
    report = await run_load(server.target, jobs, arrivals, clock=lambda: 0.0, sleep=sleep)
    due_s = list(itertools.islice(arrivals.arrivals_s(), 4))
    assert slept_s == due_s
    assert [outcome.start_s for outcome in report.outcomes] == due_s
    assert report.summary().num_failed == 0


@pytest.mark.anyio
async def test_a_job_that_cannot_be_sent_ends_no_other(server: FakeServer) -> None:
    server.play(says("x"))
    bad, good = (await run_load(server.target, [Job([-1], 1), Job("a", 1)], Concurrency(1))).outcomes
    assert bad.error is not None
    assert good.error is None


@pytest.mark.anyio
async def test_no_server_is_an_error_not_a_result(server: FakeServer) -> None:
    server.stop()
    with pytest.raises(UnavailableError):
        await run_load(server.target, [Job("a", 1)], Concurrency(1))
