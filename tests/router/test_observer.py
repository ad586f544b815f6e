from __future__ import annotations

from core.events import LifecycleEvent
from core.messages import Load, TransferStats, WorkerRole
from core.ticket import Ticket
from router.info import ClusterInfo, WorkerInfo
from router.ledger import Failure
from router.observer import MetricsObserver, cluster_sample
from telemetry.cluster import ClusterSample, WorkerSample
from telemetry.metrics import Metrics
from tests.router.test_admission import entry

NAMES = {"p-1": "p0", "d-1": "d0"}


def worker(worker_id: str, *, connected: bool) -> WorkerInfo:
    load = Load(
        num_running=1,
        num_waiting=2,
        num_free_blocks=3,
        num_preemptions=4,
        num_parked=5,
        parked_bytes=6,
        num_parks=7,
        num_recomputes=8,
    )
    return WorkerInfo(worker_id, f"{worker_id}-1", WorkerRole.DECODE, "h:1", connected, False, load, 5, 8, 0, "cpu")


def test_gauges_show_connected_workers_only() -> None:
    info = ClusterInfo((worker("d0", connected=True), worker("d1", connected=False)), (), num_queued=6, num_running=7)
    assert cluster_sample(info) == ClusterSample(
        num_running=7,
        num_waiting=6,
        workers=(
            WorkerSample(
                worker="d0",
                incarnation="d0-1",
                num_running=1,
                num_waiting=2,
                num_blocks=5,
                num_free_blocks=3,
                num_preemptions=4,
                num_parked=5,
                parked_bytes=6,
                num_parks=7,
                num_recomputes=8,
            ),
        ),
    )


def observed() -> tuple[MetricsObserver, Metrics]:
    metrics = Metrics("tiny")
    return MetricsObserver(metrics, lambda: None, lambda incarnation: NAMES.get(incarnation, "")), metrics


def test_what_had_been_computed_when_an_attempt_failed_is_counted() -> None:
    observer, metrics = observed()
    one = entry(0)
    one.failure = Failure("session_lost", "gone")
    observer.on_event(one, LifecycleEvent.RETRIED, 1.0)
    assert metrics.registry.get_sample_value("penstock_recomputed_tokens_total", {"reason": "session_lost"}) == 0
    one.stats.ttft_s = 0.5
    one.request.output_token_ids.extend([7, 8])
    observer.on_event(one, LifecycleEvent.RETRIED, 2.0)
    assert metrics.registry.get_sample_value("penstock_recomputed_tokens_total", {"reason": "session_lost"}) == 2
    assert metrics.registry.get_sample_value("penstock_retries_total", {"reason": "session_lost"}) == 2


def test_transfers_and_failures_are_told_by_the_names_of_workers() -> None:
    observer, metrics = observed()
    observer.on_transfer(entry(0), Ticket("r", 1, "t", "p-1", "d-1", 1), TransferStats(64, 0.5, 0.0))
    observer.on_worker_failure(entry(0), "d-1", "lease_expired")
    pair = {"prefill_worker": "p0", "decode_worker": "d0"}
    assert metrics.registry.get_sample_value("penstock_kv_transfer_bytes_total", pair) == 64
    lost = {"worker": "d0", "reason": "lease_expired"}
    assert metrics.registry.get_sample_value("penstock_worker_failures_total", lost) == 1
