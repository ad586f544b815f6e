"""What carrying KV costs, of each pair of workers, and what workers gave up by themselves.

rate(penstock_kv_transfer_bytes_total[1m]) / rate(penstock_kv_transfer_seconds_total[1m])  bytes/s while it carries
rate(penstock_kv_transfer_exposed_seconds_total[1m]) / rate(penstock_kv_transfers_total[1m])  what is waited for
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

MAX_PAIRS = 256
OTHER = "other"
"""Stands for pairs and workers beyond the first so many, so that workers that come and go can't grow the metrics."""

SPEED_BUCKETS = tuple(step * 10**power for power in range(6, 11) for step in (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0))
OVERLAP_BUCKETS = tuple(percent / 100 for percent in (*range(0, 90, 10), 90, 95, 98, 99, 100))


class TransferMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        pair = ["prefill_worker", "decode_worker"]
        self._bytes = Counter(
            "penstock_kv_transfer_bytes", "KV cache carried from prefill to decode", pair, registry=registry
        )
        self._transfers = Counter("penstock_kv_transfers", "Transfers that were carried", pair, registry=registry)
        self._seconds = Counter(
            "penstock_kv_transfer_seconds", "Time that channels spent on transfers", pair, registry=registry
        )
        self._exposed = Counter(
            "penstock_kv_transfer_exposed_seconds",
            "Time from the end of computing to the end of transfers",
            pair,
            registry=registry,
        )
        self._speed = Histogram(
            "penstock_kv_transfer_bytes_per_second",
            "Payload of a transfer over the time its channel spent on it",
            buckets=SPEED_BUCKETS,
            registry=registry,
        )
        self._overlap = Histogram(
            "penstock_kv_transfer_overlap_ratio",
            "Share of a transfer that was hidden behind computing, 0 to 1",
            buckets=OVERLAP_BUCKETS,
            registry=registry,
        )
        self._failures = Counter(
            "penstock_worker_failures",
            "Attempts that a worker gave up by itself: reason lease_expired is a lease that ran out",
            ["worker", "reason"],
            registry=registry,
        )
        self._pairs: set[tuple[str, str]] = set()
        self._workers: set[str] = set()

    def on_transfer(
        self, prefill_worker: str, decode_worker: str, num_bytes: int, transfer_s: float, exposed_s: float
    ) -> None:
        pair = self._known_pair((prefill_worker, decode_worker))
        self._transfers.labels(*pair).inc()
        self._bytes.labels(*pair).inc(num_bytes)
        self._seconds.labels(*pair).inc(transfer_s)
        self._exposed.labels(*pair).inc(exposed_s)
        if transfer_s > 0:
            self._speed.observe(num_bytes / transfer_s)
            self._overlap.observe(max(0.0, 1.0 - exposed_s / transfer_s))

    def on_worker_failure(self, worker: str, reason: str) -> None:
        if worker not in self._workers and len(self._workers) >= MAX_PAIRS:
            worker = OTHER
        self._workers.add(worker)
        self._failures.labels(worker, reason).inc()

    def _known_pair(self, pair: tuple[str, str]) -> tuple[str, str]:
        if pair not in self._pairs and len(self._pairs) >= MAX_PAIRS:
            return OTHER, OTHER
        self._pairs.add(pair)
        return pair
