"""Prefix-aware: where the most of the prompt is cached already, unless waiting there costs more than computing it anew.

As Mooncake (Qin et al., FAST 2025) has it, hits and queues are compared in one currency, predicted time: a hot prefix
spreads to more workers as soon as the queue of those that have it costs more than it saves.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from core.messages import WorkerRole
from router.policies.best_of import best_of
from router.policies.fleet import Kind, Lane, Worker
from router.policies.least_loaded import fastest
from router.policies.search import NUM_HOLDERS, Choice, Search

MIXED = WorkerRole.MIXED
NUM_FIRST = 4
"""Of the workers of a kind that are equally idle, one of so many is looked at."""
JITTER = 0.03
"""Costs differ by up to so much at random, so that routers with the same news do not all choose the same worker."""


class PrefixAware:
    name = "prefix_aware"

    def choose(self, search: Search, rng: random.Random) -> Choice | None:
        if not any(search.levels(cache) for cache in search.need.hashes):
            return fastest(search, "no_prefix_cached")
        fleet, draw, num_output = search.fleet, rng.random, search.num_output_tokens
        prefills = near(search, fleet.prefill_lanes, fleet.prefill_bits, rng)
        others = near(search, fleet.decode_lanes, fleet.decode_bits, rng)
        others |= {p: None for p in prefills if p.role is MIXED}
        read_s = {p: search.prefill_s(p) * (1.0 + JITTER * draw()) for p in prefills}
        write_s = {d: search.step_s(d) * num_output * (1.0 + JITTER * draw()) for d in others if search.has_blocks(d)}
        choice = best_of(search, read_s, write_s, "prefix_cached")
        if choice is None:
            return fastest(search, "no_holder_has_room")
        if search.num_cached(choice.prefill) or search.num_cached(choice.decode):
            return choice
        return Choice(choice.prefill, choice.decode, "holders_busy")


def near(search: Search, lanes: Mapping[Kind, Lane], half: int, rng: random.Random) -> dict[Worker, None]:
    """Workers of one half worth a look: those that have most of the prompt, and one of the least loaded of each kind.

    Of many that have as much, some are drawn: looking always at the same would load these.
    """
    found: dict[Worker, None] = {}
    for lane in search.lanes(lanes):
        ranks = lane.ranks
        drawn = ranks[int(rng.random() * min(NUM_FIRST, len(ranks)))]
        worker = (drawn if drawn[0] == ranks[0][0] else ranks[0])[3]
        if search.may(worker):
            found[worker] = None
    fleet = search.fleet
    for cache in search.need.hashes:
        num_left, half_left = NUM_HOLDERS, half
        for num_blocks, mask in search.levels(cache):
            fresh = mask & half_left
            half_left &= ~mask
            many = fresh.bit_count() > num_left
            while fresh and num_left:
                above = fresh >> int(rng.random() * fresh.bit_length()) if many else fresh
                bit = 1 << (fresh.bit_length() - above.bit_length() + (above & -above).bit_length() - 1)
                fresh ^= bit
                num_left -= 1
                worker = fleet.workers[fleet.caches.name(bit)]
                if search.may(worker):
                    search.note_cached(worker, num_blocks)
                    found[worker] = None
            if not num_left:
                break
    return found
