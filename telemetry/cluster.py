"""Gauges of the cluster, read when somebody looks: a worker that is gone leaves no series behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


@dataclass(frozen=True, slots=True)
class WorkerSample:
    """`num_preemptions` counts from the start of that incarnation."""

    worker: str
    incarnation: str
    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    num_preemptions: int


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
    ("penstock_worker_kv_usage", "Share of KV blocks in use, 0 to 1", lambda w: usage([w])),
)


class ClusterCollector(Collector):
    def __init__(self, sample: Callable[[], ClusterSample], model_name: str, engine: str) -> None:
        self._sample = sample
        self._labels = (model_name, engine)
        self._num_preemptions = 0
        self._seen: dict[str, int] = {}  # preemptions counted so far, by incarnation

    def collect(self) -> Iterator[Metric]:
        sample = self._sample()
        self._count_preemptions(sample)
        yield self._gauge("vllm:num_requests_running", "Requests that workers have", sample.num_running)
        yield self._gauge("vllm:num_requests_waiting", "Requests in the router's queue", sample.num_waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1", usage(sample.workers))
        preemptions = CounterMetricFamily(
            "vllm:num_preemptions", "Requests sent back to wait for blocks", labels=["model_name", "engine"]
        )
        preemptions.add_metric(self._labels, self._num_preemptions)
        yield preemptions
        for name, text, value in _WORKER_GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=["worker"])
            for worker in sample.workers:
                gauge.add_metric([worker.worker], value(worker))
            yield gauge

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        gauge = GaugeMetricFamily(name, text, labels=["model_name", "engine"])
        gauge.add_metric(self._labels, value)
        return gauge

    def _count_preemptions(self, sample: ClusterSample) -> None:
        """A worker counts from zero each time it starts; their sum must never fall."""
        for worker in sample.workers:
            self._num_preemptions += worker.num_preemptions - self._seen.get(worker.incarnation, 0)
        self._seen |= {worker.incarnation: worker.num_preemptions for worker in sample.workers}


def usage(workers: Sequence[WorkerSample]) -> float:
    """Share of the KV blocks of these workers that are in use."""
    num_blocks = sum(worker.num_blocks for worker in workers)
    num_free = sum(worker.num_free_blocks for worker in workers)
    return (num_blocks - num_free) / num_blocks if num_blocks else 0.0
