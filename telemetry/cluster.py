"""Gauges of the cluster, read when somebody looks: a worker that is gone leaves no series behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


@dataclass(frozen=True, slots=True)
class WorkerSample:
    """What is counted, is counted from the start of that incarnation; prefixes in tokens."""

    worker: str
    incarnation: str
    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    num_preemptions: int = 0
    num_prefix_queries: int = 0
    num_prefix_hits: int = 0
    mask_wait_s: float = 0.0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_parked: int = 0
    parked_bytes: int = 0
    num_parks: int = 0
    num_recomputes: int = 0


@dataclass(frozen=True, slots=True)
class ClusterSample:
    """Requests placed and in the router's queue, and the workers that are connected."""

    num_running: int
    num_waiting: int
    workers: tuple[WorkerSample, ...]


_WORKER_GAUGES: Sequence[tuple[str, str, Callable[[WorkerSample], float]]] = (
    ("penstock_worker_running", "Requests in the batch", lambda w: w.num_running),
    ("penstock_worker_waiting", "Requests that wait on the worker", lambda w: w.num_waiting),
    ("penstock_worker_free_blocks", "KV blocks that nothing holds", lambda w: w.num_free_blocks),
    ("penstock_worker_parked", "Requests whose KV is in host memory", lambda w: w.num_parked),
    ("penstock_worker_parked_bytes", "Host memory that the KV of parked requests takes", lambda w: w.parked_bytes),
    ("penstock_worker_kv_usage", "Share of KV blocks in use, 0 to 1", lambda w: usage([w])),
)


_WORKER_COUNTERS: Sequence[tuple[str, str, Callable[[WorkerSample], int]]] = (
    ("num_preemptions", "Requests sent back to wait for blocks", lambda w: w.num_preemptions),
    ("num_parks", "Those of them whose KV was kept in host memory", lambda w: w.num_parks),
    ("num_recomputes", "Those of them whose KV was lost, and computed anew", lambda w: w.num_recomputes),
    ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", lambda w: w.num_prefix_queries),
    ("prefix_cache_hits", "Prompt tokens found in the prefix cache", lambda w: w.num_prefix_hits),
    ("spec_decode_num_drafts", "Times that next tokens were guessed", lambda w: w.num_drafts),
    ("spec_decode_num_draft_tokens", "Tokens that were guessed", lambda w: w.num_draft_tokens),
    ("spec_decode_num_accepted_tokens", "Guessed tokens that were right", lambda w: w.num_accepted_tokens),
)
"""Of each worker as `penstock_worker_*`, and as `vllm:*` of all that were ever there."""


class ClusterCollector(Collector):
    def __init__(self, sample: Callable[[], ClusterSample], model_name: str, engine: str) -> None:
        self._sample = sample
        self._labels = (model_name, engine)
        self._totals: Counter[str] = Counter()
        self._seen: dict[tuple[str, str], int] = {}  # what was counted so far, by name and incarnation

    def collect(self) -> Iterator[Metric]:
        sample = self._sample()
        yield self._gauge("vllm:num_requests_running", "Requests that workers have", sample.num_running)
        yield self._gauge("vllm:num_requests_waiting", "Requests in the router's queue", sample.num_waiting)
        num_swapped = sum(worker.num_parked for worker in sample.workers)
        yield self._gauge("vllm:num_requests_swapped", "Requests whose KV is in host memory", num_swapped)
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1", usage(sample.workers))
        for name, text, count in _WORKER_COUNTERS:
            yield self._total(name, text, count, sample.workers)
            counter = CounterMetricFamily(f"penstock_worker_{name}", text, labels=["worker"])
            for worker in sample.workers:
                counter.add_metric([worker.worker], count(worker))
            yield counter
        waited = CounterMetricFamily(
            "penstock_worker_mask_wait_seconds", "Steps waited for the token masks of grammars", labels=["worker"]
        )
        for worker in sample.workers:
            waited.add_metric([worker.worker], worker.mask_wait_s)
        yield waited
        for name, text, value in _WORKER_GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=["worker"])
            for worker in sample.workers:
                gauge.add_metric([worker.worker], value(worker))
            yield gauge

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        gauge = GaugeMetricFamily(name, text, labels=["model_name", "engine"])
        gauge.add_metric(self._labels, value)
        return gauge

    def _total(
        self, name: str, text: str, count: Callable[[WorkerSample], int], workers: Sequence[WorkerSample]
    ) -> CounterMetricFamily:
        """A worker counts from zero each time it starts; their sum must never fall."""
        for worker in workers:
            key = name, worker.incarnation
            self._totals[name] += count(worker) - self._seen.get(key, 0)
            self._seen[key] = count(worker)
        counter = CounterMetricFamily(f"vllm:{name}", text, labels=["model_name", "engine"])
        counter.add_metric(self._labels, self._totals[name])
        return counter


def usage(workers: Sequence[WorkerSample]) -> float:
    """Share of the KV blocks of these workers that are in use."""
    num_blocks = sum(worker.num_blocks for worker in workers)
    num_free = sum(worker.num_free_blocks for worker in workers)
    return (num_blocks - num_free) / num_blocks if num_blocks else 0.0
