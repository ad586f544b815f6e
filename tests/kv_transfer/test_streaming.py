"""What leaves at once follows from the link, and the link from what was seen of it."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.streaming import UNMEASURED, LinkFit, LinkMeter, batch_bytes

KIB, MIB = 1 << 10, 1 << 20
fits = st.builds(LinkFit, st.floats(1e-6, 1e-1), st.floats(1e6, 1e11))
totals = st.integers(0, 1 << 40)
sizes = st.integers(0, 16 * MIB)
seconds = st.floats(allow_nan=True, allow_infinity=True)


def cost_s(fit: LinkFit, total: int, num_batches: float) -> float:
    """What batches cost besides, and the last one's way."""
    return num_batches * fit.latency_s + total / num_batches / fit.bytes_per_s


@given(fits, st.integers(MIB, 1 << 40))
def test_no_other_number_of_batches_costs_less(fit: LinkFit, total: int) -> None:
    chosen = max(1.0, total / batch_bytes(total, fit))
    least = min(cost_s(fit, total, k) for k in (1, chosen / 2, chosen * 2, 10, 100, 1000) if k >= 1)
    assert cost_s(fit, total, chosen) <= least * (1 + 1e-3)


@given(fits, st.floats(0.0, 3.0))
def test_a_prompt_leaves_in_one_piece_up_to_the_crossover(fit: LinkFit, share: float) -> None:
    total = math.floor(share * fit.crossover_bytes)
    if share <= 1:
        assert batch_bytes(total, fit) >= total
    if share >= 1.5 and total >= 100:
        assert batch_bytes(total, fit) < total


@given(fits, totals, totals)
def test_more_bytes_never_leave_in_smaller_batches_nor_in_fewer(fit: LinkFit, one: int, other: int) -> None:
    less, more = sorted((one, other))
    assert batch_bytes(less, fit) <= batch_bytes(more, fit)
    assert less / batch_bytes(less, fit) <= more / batch_bytes(more, fit) + 1


@given(fits, totals)
def test_a_user_may_choose(fit: LinkFit, total: int) -> None:
    assert batch_bytes(total, fit, "layerwise") == 1
    assert batch_bytes(total, fit, "serial") >= total


@given(st.lists(st.tuples(sizes, seconds), max_size=60))
def test_a_fit_is_always_one_that_can_be_used(samples: list[tuple[int, float]]) -> None:
    meter = LinkMeter()
    for num_bytes, took in samples:
        meter.observe(num_bytes, took)
        assert 0 < meter.fit.latency_s <= 1.0
        assert 1e6 <= meter.fit.bytes_per_s <= 1e12
        assert batch_bytes(100 * MIB, meter.fit) >= 1


@settings(deadline=None)
@given(st.floats(2e-5, 5e-3), st.floats(1e8, 2e10), st.integers(0, 1000))
def test_noise_that_delays_some_batches_hardly_changes_the_fit(latency_s: float, bytes_per_s: float, seed: int) -> None:
    meter, source = LinkMeter(), random.Random(seed)
    for _ in range(200):
        num_bytes = source.choice([0, 64 * KIB, MIB, 4 * MIB, 16 * MIB])
        delay_s = source.expovariate(1 / 0.02) if source.random() < 0.4 else 0.0
        meter.observe(num_bytes, (latency_s + num_bytes / bytes_per_s) * source.uniform(1.0, 1.05) + delay_s)
    assert meter.fit.latency_s == pytest.approx(latency_s, rel=0.3, abs=0.1 * 16 * MIB / bytes_per_s)
    assert meter.fit.bytes_per_s == pytest.approx(bytes_per_s, rel=0.35)


def test_a_link_that_changes_is_seen_to() -> None:
    meter = LinkMeter()
    for rate in (1e10, 1e8):
        for _ in range(40):
            for num_bytes in (0, MIB, 4 * MIB):
                meter.observe(num_bytes, 1e-4 + num_bytes / rate)
    assert meter.fit.bytes_per_s == pytest.approx(1e8, rel=0.01)


def test_an_unmeasured_link_is_taken_for_one_of_this_host() -> None:
    assert LinkMeter().fit == UNMEASURED
    assert 64 * KIB < UNMEASURED.crossover_bytes < 4 * MIB


def test_large_batches_that_wait_for_a_core_do_not_hide_what_a_small_one_costs() -> None:
    meter = LinkMeter()
    for _ in range(20):
        for num_bytes, took in ((0, 1e-4), (2 * MIB, 0.005), (4 * MIB, 0.01), (16 * MIB, 0.4)):
            meter.observe(num_bytes, took)
    assert meter.fit.latency_s == pytest.approx(1e-4)
