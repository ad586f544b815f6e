from __future__ import annotations

from core.messages import Load, WorkerRole
from router.info import ClusterInfo, WorkerInfo
from router.observer import cluster_sample
from telemetry.cluster import ClusterSample, WorkerSample


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
