"""On two workers, or all on the one that decodes: decided for each request by what it costs all requests together.

Apart, a prompt waits for a prefill worker, is read there, and its K and V are sent. Together, it waits for the prompts
of the decode worker and is read there, and everybody who decodes there stands still for as long. So prompts that are
short, or that the decode worker has most of already, cost less together; long ones, and those that would disturb many,
apart.
"""

from __future__ import annotations

from itertools import islice

from core.messages import WorkerRole
from router.policies.fleet import Worker
from router.policies.search import NO_LIMIT, NUM_HOLDERS, Choice, Search

NUM_LEAST_LOADED = 8
"""Workers of a kind that are looked at, beside those that have some of the prompt."""


def reconsider(search: Search, choice: Choice | None) -> Choice | None:
    """The pair that a policy chose, or its decode worker alone, whichever costs less. Without a pair, any worker alone.

    Whether a mixed worker does both has been the policy's choice.
    """
    if choice is None:
        return alone(search, "no_pair_has_room")
    prefill, decode = choice.prefill, choice.decode
    if decode.role is not WorkerRole.DECODE or not decode.kind.alone:
        return choice
    apart_s = search.prefill_s(prefill) + search.handover_s(prefill, decode)
    if search.prefill_s(decode) + disturbance_s(search, decode) >= apart_s:
        return choice
    mostly_cached = 2 * search.num_cached(decode) > search.need.num_tokens
    return Choice(decode, decode, "cached_here" if mostly_cached else "cheaper_here")


def alone(search: Search, why: str) -> Choice | None:
    """The worker that could do both halves at the least cost; None where none has room."""
    best: Choice | None = None
    best_s = NO_LIMIT
    for worker in candidates(search):
        if search.may(worker) and search.has_blocks(worker):
            write_s = search.step_s(worker) * search.num_output_tokens
            cost_s = search.prefill_s(worker) + disturbance_s(search, worker) + write_s
            if cost_s < best_s:
                best, best_s = Choice(worker, worker, why), cost_s
    return best


def candidates(search: Search) -> dict[Worker, None]:
    """The least loaded of each kind that have room, and those that have most of the prompt."""
    fleet = search.fleet
    found: dict[Worker, None] = {}
    for lane in search.lanes(fleet.local_lanes):
        with_room = (rank[3] for rank in lane.ranks if search.may(rank[3]) and search.has_blocks(rank[3]))
        found |= dict.fromkeys(islice(with_room, NUM_LEAST_LOADED))
    for cache in search.need.hashes:
        num_left = NUM_HOLDERS
        for _, mask in search.levels(cache):
            holders = mask & fleet.decode_bits
            while holders and num_left:
                bit = holders & -holders
                holders ^= bit
                num_left -= 1
                worker = fleet.workers[fleet.caches.name(bit)]
                if worker.kind.alone:
                    found[worker] = None
    return found


def disturbance_s(search: Search, worker: Worker) -> float:
    """What all those who decode on the worker lose together while it reads the prompt.

    Without limit where that would break the target for the gap between two tokens.
    """
    read_s = worker.kind.prefill.slope * (search.need.num_tokens - search.num_cached(worker))
    itl_s = search.need.itl_s
    if worker.num_active and itl_s is not None and read_s + search.step_s(worker) > itl_s:
        return NO_LIMIT
    return read_s * worker.num_active
