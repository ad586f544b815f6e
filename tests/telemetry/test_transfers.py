"""What transfers cost, by pair, in a bounded number of series."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from telemetry.transfers import MAX_PAIRS, TransferMetrics


def made() -> tuple[TransferMetrics, CollectorRegistry]:
    registry = CollectorRegistry()
    return TransferMetrics(registry), registry


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, labels)


def test_transfers_add_up_by_pair() -> None:
    metrics, registry = made()
    metrics.on_transfer("p0", "d0", 1000, 0.5, 0.125)
    metrics.on_transfer("p0", "d0", 500, 0.25, 0.0)
    metrics.on_transfer("p0", "d1", 7, 1.0, 1.0)
    pair = {"prefill_worker": "p0", "decode_worker": "d0"}
    assert value(registry, "penstock_kv_transfers_total", **pair) == 2
    assert value(registry, "penstock_kv_transfer_bytes_total", **pair) == 1500
    assert value(registry, "penstock_kv_transfer_seconds_total", **pair) == 0.75
    assert value(registry, "penstock_kv_transfer_exposed_seconds_total", **pair) == 0.125


def test_speed_is_bytes_over_the_channels_own_time() -> None:
    metrics, registry = made()
    metrics.on_transfer("p0", "d0", 3_000_000_000, 1.5, 0.0)
    assert value(registry, "penstock_kv_transfer_bytes_per_second_sum") == 2e9
    assert value(registry, "penstock_kv_transfer_bytes_per_second_bucket", le="2e+09") == 1
    assert value(registry, "penstock_kv_transfer_bytes_per_second_bucket", le="1.5e+09") == 0


def test_the_overlap_is_what_was_hidden_and_never_below_nothing() -> None:
    metrics, registry = made()
    metrics.on_transfer("p0", "d0", 1, 0.5, 0.125)
    metrics.on_transfer("p0", "d0", 1, 0.5, 2.0)  # it waited behind another one after computing
    assert value(registry, "penstock_kv_transfer_overlap_ratio_sum") == 0.75
    assert value(registry, "penstock_kv_transfer_overlap_ratio_bucket", le="0.0") == 1


def test_a_transfer_of_no_time_has_no_speed() -> None:
    metrics, registry = made()
    metrics.on_transfer("p0", "d0", 0, 0.0, 0.0)
    assert value(registry, "penstock_kv_transfer_bytes_per_second_count") == 0
    assert value(registry, "penstock_kv_transfers_total", prefill_worker="p0", decode_worker="d0") == 1


def test_leases_that_ran_out_are_told_by_worker() -> None:
    metrics, registry = made()
    metrics.on_worker_failure("d0", "lease_expired")
    assert value(registry, "penstock_worker_failures_total", worker="d0", reason="lease_expired") == 1


def test_workers_that_come_and_go_do_not_grow_the_metrics_without_end() -> None:
    metrics, registry = made()
    for i in range(MAX_PAIRS + 10):
        metrics.on_transfer(f"p{i}", "d0", 1, 1.0, 0.0)
        metrics.on_worker_failure(f"p{i}", "pair_down")
    families = {f.name: f for f in text_string_to_metric_families(generate_latest(registry).decode())}
    for name in ("penstock_kv_transfer_bytes", "penstock_worker_failures"):
        totals = [sample for sample in families[name].samples if sample.name.endswith("_total")]
        assert len(totals) == MAX_PAIRS + 1, name
        assert sum(sample.value for sample in totals) == MAX_PAIRS + 10
    other = {"prefill_worker": "other", "decode_worker": "other"}
    assert value(registry, "penstock_kv_transfers_total", **other) == 10
