"""SLO-aware: the fullest workers that still meet the request's targets, so that the emptiest stay free for the urgent.

The order in which requests come here is the queue's: the earliest deadline first. Without targets it is least loaded.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from operator import itemgetter

from router.policies.fleet import Lane, Worker
from router.policies.least_loaded import fastest
from router.policies.search import Candidates, Choice, Search
from router.policies.speeds import Line

NUM_LOCAL = 8
"""Workers of a kind that are asked whether they meet both targets at once."""


class SloAware:
    name = "slo_aware"

    def __init__(self, margin: float) -> None:
        """`margin`: share of a target that a prediction may use up."""
        self._margin = margin

    def choose(self, search: Search, rng: random.Random) -> Choice | None:  # noqa: ARG002 - nothing is drawn
        need, fleet = search.need, search.fleet
        if need.ttft_s is None and need.itl_s is None:
            return fastest(search, "no_slo")
        ttft_s, itl_s = self._limit(need.ttft_s), self._limit(need.itl_s)
        prefill_lanes = search.lanes(fleet.prefill_lanes)
        decode_lanes = search.lanes(fleet.decode_lanes)

        def prefills_of(lane: Lane) -> Candidates:
            line = lane.kind.prefill
            return tightest(search, lane, line, line.at(need.num_tokens), ttft_s)

        def decodes_of(lane: Lane) -> Candidates:
            line = lane.kind.step
            return ((slack, d) for slack, d in tightest(search, lane, line, line.at(1), itl_s) if search.has_blocks(d))

        def both_of(lane: Lane) -> Candidates:
            """The tightest of the least loaded: the order by both halves together is not that of either."""
            found = []
            for *_, worker in lane.ranks[:NUM_LOCAL]:
                read_s = lane.kind.prefill.at(need.num_tokens) + worker.num_waiting_tokens * lane.kind.prefill.slope
                step_s = search.step_s(worker)
                if read_s <= ttft_s and step_s <= itl_s and search.may(worker) and search.has_blocks(worker):
                    found.append((spare(read_s, ttft_s) + spare(step_s, itl_s), worker))
            return sorted(found, key=lambda each: (each[0], each[1].incarnation))

        def decodes_for(prefill: Worker) -> list[Candidates]:  # noqa: ARG001 - the handover is in no target
            return [decodes_of(lane) for lane in decode_lanes]

        choice = search.cheapest(
            [prefills_of(lane) for lane in prefill_lanes],
            decodes_for,
            [both_of(lane) for lane in search.local_lanes],
            "tightest_fit",
        )
        return choice or fastest(search, "slo_out_of_reach")

    def _limit(self, target_s: float | None) -> float:
        return float("inf") if target_s is None else target_s * self._margin


def tightest(search: Search, lane: Lane, line: Line, base_s: float, limit_s: float) -> Candidates:
    """Workers predicted within the limit, by what they leave of it, as a share: the least first.

    A worker's prediction is `base_s` and `line.slope` times its load. Without a limit, the least loaded come first.
    """
    ranks, slope = lane.ranks, line.slope
    if limit_s == float("inf"):
        return ((base_s + rank[0] * slope, rank[3]) for rank in ranks if search.may(rank[3]))
    most = (limit_s - base_s) / slope if slope > 0 else (float("inf") if base_s <= limit_s else -1.0)
    end = bisect_left(ranks, most, key=itemgetter(0))
    return (
        (spare(base_s + ranks[i][0] * slope, limit_s), ranks[i][3])
        for i in range(end - 1, -1, -1)
        if search.may(ranks[i][3])
    )


def spare(predicted_s: float, limit_s: float) -> float:
    """What is left of a limit, as a share of it."""
    return 0.0 if limit_s == float("inf") else 1.0 - predicted_s / limit_s
