from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from core.stats import RequestStats
from telemetry.cluster import ClusterSample, WorkerSample
from telemetry.metrics import GAP_BUCKETS, STAGE_BUCKETS, Metrics

MODEL = {"model_name": "tiny", "engine": "0"}


def read(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of the exposition, as Prometheus reads it."""
    families = text_string_to_metric_families(metrics.render().decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return read(metrics).get((name, frozenset(labels.items())))


def worker(name: str, incarnation: str = "i", free: int = 10) -> WorkerSample:
    return WorkerSample(name, incarnation, 2, 3, num_blocks=10, num_free_blocks=free, num_parked=1, parked_bytes=64)


def counted(name: str, incarnation: str, field: str, count: int) -> WorkerSample:
    values: dict[str, Any] = {field: count}
    return replace(worker(name, incarnation), **values)


def test_the_names_of_existing_dashboards_are_all_there() -> None:
    metrics = Metrics("tiny")
    metrics.watch_cluster(lambda: ClusterSample(0, 0, ()))
    metrics.on_success("stop", RequestStats())
    names = {name for name, labels in read(metrics) if frozenset(MODEL.items()) <= labels}
    histograms = ["time_to_first_token", "inter_token_latency", "e2e_request_latency"]
    histograms += [f"request_{stage}_time" for stage in ("queue", "prefill", "decode", "inference")]
    counters = ["prefix_cache_queries", "prefix_cache_hits", "num_preemptions", "prompt_tokens", "generation_tokens"]
    assert names >= {f"vllm:{name}_seconds_bucket" for name in histograms}
    assert names >= {f"vllm:{name}_total" for name in (*counters, "request_success")}
    assert names >= {"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"}


def test_two_instances_share_nothing() -> None:
    one, other = Metrics("tiny"), Metrics("tiny")
    one.on_attempt()
    assert value(one, "penstock_attempts_total") == 1
    assert value(other, "penstock_attempts_total") == 0


def test_a_successful_request_is_counted_by_its_reason_and_timed() -> None:
    metrics = Metrics("tiny")
    stats = RequestStats(queue_s=0.25, ttft_s=1.0, e2e_s=3.0)
    metrics.on_first_token(num_prompt_tokens=7, ttft_s=1.0)
    metrics.on_tokens(2, gap_s=0.5)
    metrics.on_success("length", stats)
    assert value(metrics, "vllm:prompt_tokens_total", **MODEL) == 7
    assert value(metrics, "vllm:generation_tokens_total", **MODEL) == 3
    assert value(metrics, "vllm:request_success_total", **MODEL, finished_reason="length") == 1
    assert value(metrics, "penstock_requests_total", outcome="length") == 1
    sums = {"e2e_request_latency": 3.0, "time_to_first_token": 1.0, "inter_token_latency": 0.5}
    sums |= {"request_queue_time": 0.25, "request_prefill_time": 0.75}
    sums |= {"request_decode_time": 2.0, "request_inference_time": 2.75}
    assert {name: value(metrics, f"vllm:{name}_seconds_sum", **MODEL) for name in sums} == sums


def test_each_stage_that_happened_is_observed_once() -> None:
    metrics = Metrics("tiny")
    stats = RequestStats(queue_s=1.0, prefill_s=2.0, transfer_s=0.5, transfer_exposed_s=0.125, kv_bytes=4096)
    metrics.on_success("stop", stats)
    samples = {
        dict(labels)["stage"]: total
        for (name, labels), total in read(metrics).items()
        if name.endswith("stage_seconds_sum")
    }
    assert samples == {"queue": 1.0, "prefill": 2.0, "transfer_exposed": 0.125, "transfer_hidden": 0.375}


def test_failures_retries_and_refusals_are_counted_by_reason() -> None:
    metrics = Metrics("tiny")
    metrics.on_failure("cancelled")
    metrics.on_retry("lease_expired")
    metrics.on_refusal("no_blocks")
    assert value(metrics, "penstock_requests_total", outcome="cancelled") == 1
    assert value(metrics, "penstock_retries_total", reason="lease_expired") == 1
    assert value(metrics, "penstock_refusals_total", reason="no_blocks") == 1
    assert value(metrics, "vllm:request_success_total", **MODEL, finished_reason="stop") is None


def test_worker_gauges_are_read_at_the_scrape_and_leave_nothing_behind() -> None:
    metrics = Metrics("tiny")
    samples = [ClusterSample(4, 5, (worker("p", free=10), worker("d", free=5))), ClusterSample(0, 0, (worker("d"),))]
    metrics.watch_cluster(lambda: samples.pop(0) if len(samples) > 1 else samples[0])
    first, then = read(metrics), read(metrics)
    d, p = frozenset([("worker", "d")]), frozenset([("worker", "p")])
    assert first["penstock_worker_kv_usage", d] == 0.5
    assert first["penstock_worker_free_blocks", p] == 10
    assert (first["penstock_worker_running", d], first["penstock_worker_waiting", d]) == (2, 3)
    assert (first["penstock_worker_parked", d], first["penstock_worker_parked_bytes", d]) == (1, 64)
    assert first["vllm:num_requests_swapped", frozenset(MODEL.items())] == 2
    assert first["vllm:kv_cache_usage_perc", frozenset(MODEL.items())] == 0.25
    assert first["vllm:num_requests_running", frozenset(MODEL.items())] == 4
    assert first["vllm:num_requests_waiting", frozenset(MODEL.items())] == 5
    assert ("penstock_worker_running", p) not in then
    assert ("penstock_worker_running", d) in then


COUNTED = [
    ("num_preemptions",) * 2,
    ("num_parks",) * 2,
    ("num_recomputes",) * 2,
    ("prefix_cache_queries", "num_prefix_queries"),
    ("prefix_cache_hits", "num_prefix_hits"),
    ("spec_decode_num_drafts", "num_drafts"),
    ("spec_decode_num_draft_tokens", "num_draft_tokens"),
    ("spec_decode_num_accepted_tokens", "num_accepted_tokens"),
]


@pytest.mark.parametrize(("name", "field"), COUNTED)
def test_counts_of_workers_never_fall_when_one_restarts(name: str, field: str) -> None:
    metrics = Metrics("tiny")
    states = [
        ClusterSample(0, 0, (counted("d", "one", field, 3),)),
        ClusterSample(0, 0, ()),
        ClusterSample(0, 0, (counted("d", "one", field, 4),)),
        ClusterSample(0, 0, (counted("d", "two", field, 1),)),
    ]
    metrics.watch_cluster(lambda: states.pop(0))
    assert [value(metrics, f"vllm:{name}_total", **MODEL) for _ in range(4)] == [3, 3, 4, 5]


@pytest.mark.parametrize(("name", "field"), COUNTED)
def test_counts_are_told_of_each_worker_too(name: str, field: str) -> None:
    metrics = Metrics("tiny")
    metrics.watch_cluster(lambda: ClusterSample(0, 0, (counted("p", "i", field, 3), counted("d", "j", field, 4))))
    assert [value(metrics, f"penstock_worker_{name}_total", worker=worker) for worker in "pd"] == [3, 4]


@pytest.mark.parametrize("buckets", [GAP_BUCKETS, STAGE_BUCKETS])
def test_buckets_below_a_tenth_of_a_second_are_never_wider_than_half(buckets: tuple[float, ...]) -> None:
    assert buckets[0] == 0.0001
    short = [bound for bound in buckets if bound <= 0.1]
    assert all(1 < high / low <= 1.5 + 1e-9 for low, high in pairwise(short))
    assert all(len(repr(bound)) <= 8 and math.isfinite(bound) for bound in buckets)


def test_the_time_that_steps_waited_for_grammars_is_told_of_each_worker() -> None:
    metrics = Metrics("tiny")
    workers = replace(worker("p"), mask_wait_s=0.25), replace(worker("d"), mask_wait_s=1.5)
    metrics.watch_cluster(lambda: ClusterSample(0, 0, workers))
    text = metrics.render().decode()
    assert 'penstock_worker_mask_wait_seconds_total{worker="p"} 0.25' in text
    assert 'penstock_worker_mask_wait_seconds_total{worker="d"} 1.5' in text
