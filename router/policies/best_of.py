"""The best of a few workers that a policy has picked, whose costs it has reckoned."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter

from core.messages import WorkerRole
from router.policies.fleet import Kind, Worker
from router.policies.search import NO_LIMIT, Candidates, Choice, Search

MIXED = WorkerRole.MIXED


def best_of(search: Search, read_s: Mapping[Worker, float], write_s: Mapping[Worker, float], why: str) -> Choice | None:
    """The least sum, handover included. The best of each half are nearly always a pair that is up."""
    if not write_s:
        return None
    alone_s, alone = NO_LIMIT, None
    if search.need.mode != "require":
        sums = ((read_s[d] + cost, d) for d, cost in write_s.items() if d.role is MIXED and d in read_s)
        alone_s, alone = min(sums, key=itemgetter(0), default=(NO_LIMIT, None))
    if read_s:
        prefill = min(read_s, key=read_s.__getitem__)
        handed_s, decode = NO_LIMIT, prefill
        link, num_tokens, num_cached = prefill.kind.link, search.need.num_tokens, search.num_cached
        for d, cost in write_s.items():
            total = cost + link(d.kind).at(num_tokens - num_cached(d))
            if total < handed_s and d is not prefill:
                handed_s, decode = total, d
        if read_s[prefill] + handed_s < alone_s:
            if search.connected(prefill, decode):
                return Choice(prefill, decode, why)
            both: list[Candidates] = [[(alone_s, alone)]] if alone is not None else []
            return best_connected(search, read_s, write_s, both, why)
    return None if alone is None else Choice(alone, alone, why)


def best_connected(
    search: Search,
    read_s: Mapping[Worker, float],
    write_s: Mapping[Worker, float],
    both: list[Candidates],
    why: str,
) -> Choice | None:
    """The same, over pairs that are up only."""

    def decodes_for(prefill: Worker) -> list[Candidates]:
        return ascending((cost + search.handover_s(prefill, d), d) for d, cost in write_s.items())

    return search.cheapest(ascending((cost, p) for p, cost in read_s.items()), decodes_for, both, why)


def ascending(candidates: Candidates) -> list[Candidates]:
    """A list for each kind, the cheapest first; between equals by name."""
    by_kind: dict[Kind, list[tuple[float, str, Worker]]] = {}
    for cost, worker in candidates:
        by_kind.setdefault(worker.kind, []).append((cost, worker.incarnation, worker))
    for each in by_kind.values():
        each.sort()
    return [[(cost, worker) for cost, _, worker in each] for each in by_kind.values()]
