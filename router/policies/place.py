"""One placement: the policy chooses, then it is weighed whether one worker alone would do better."""

from __future__ import annotations

import random

from core.messages import WorkerRole
from core.request import Disaggregation
from router.policies.disaggregate import alone, reconsider
from router.policies.fleet import Fleet
from router.policies.model import Need, NoPlacement, Placement, Route
from router.policies.search import Policy, Search


def place(policy: Policy, need: Need, fleet: Fleet, rng: random.Random) -> Placement | NoPlacement:
    """Where `need` goes now, or why nowhere."""
    fleet.settle()
    longest = fleet.longest_route(need.mode)
    if not longest:
        return NoPlacement(False, ("no_route",))
    if need.num_tokens + 1 > longest:
        return NoPlacement(False, ("too_long",))
    avoid = need.avoid
    if avoid and not any_without(avoid, fleet, need.mode, min(need.max_total_tokens, longest)):
        avoid = frozenset()
    search = Search(need, fleet, longest=longest, avoid=avoid)
    choice = alone(search, "asked_for") if need.mode == "local" else policy.choose(search, rng)
    if need.mode == "prefer":
        choice = reconsider(search, choice)
    if choice is None:
        return NoPlacement(True, what_lacks(search))
    prefill, decode = choice.prefill, choice.decode
    epoch = 0 if prefill is decode else fleet.epoch(prefill.incarnation, decode.incarnation)
    assert epoch is not None, "a policy chose a pair that is not up"
    reasons = ["local" if prefill is decode else "disaggregated", choice.why]
    if avoid:
        reasons.append("avoided_failed_worker")
    route = Route(prefill.incarnation, decode.incarnation, epoch)
    return Placement(route, tuple(reasons), policy.name, search.forecast(prefill, decode))


def any_without(avoid: frozenset[str], fleet: Fleet, mode: Disaggregation, min_len: int) -> bool:
    """Whether a route that is long enough, with room or without, does without these workers."""

    def long_enough(incarnation: str) -> bool:
        return fleet.workers[incarnation].kind.max_model_len >= min_len

    return any(
        not route.touches(avoid) and long_enough(route.prefill) and long_enough(route.decode)
        for route in fleet.routes(mode)
    )


def what_lacks(search: Search) -> tuple[str, ...]:
    """What stands in the way, each thing named once."""
    lacks = set()
    for worker in search.fleet.workers.values():
        if not worker.taking:
            continue
        if worker.incarnation in search.need.refused_by:
            lacks.add("refused")
        elif not worker.open:
            lacks.add("no_decode_credit" if worker.role is WorkerRole.DECODE else "no_prefill_credit")
        elif worker.role is not WorkerRole.PREFILL and not search.has_blocks(worker):
            lacks.add("no_decode_blocks")
    return tuple(sorted(lacks)) or ("no_pair",)
