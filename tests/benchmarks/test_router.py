"""The measurement of placement measures what it says."""

from __future__ import annotations

import random

from benchmarks.router_placement import CACHE, PROMPT_BLOCKS, fill_caches, fleet_of, row_of
from core.messages import WorkerRole


def test_the_fleet_has_workers_of_every_role_and_knows_as_many_blocks_as_is_said() -> None:
    fleet = fleet_of(310)
    prompts = fill_caches(fleet, random.Random(0), 60_000)
    assert (len(fleet.workers), len(fleet.caches)) == (310, 60_000)
    assert {worker.role for worker in fleet.workers.values()} == set(WorkerRole)
    assert {len(hashes) for hashes in prompts} == {PROMPT_BLOCKS}
    assert fleet.cache_kinds == {CACHE}


def test_a_median_above_the_limit_is_a_miss() -> None:
    assert row_of("x", [40e-6] * 100, 50).ok
    assert not row_of("x", [60e-6] * 100, 50).ok
