"""Prefixes that a decode worker has are brought to the prefill worker that is to read the prompt, where that is faster.

An answer is in the cache of the worker that wrote it. When it comes again as part of the next prompt, a prefill worker
knows the part before it at best.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from core.clock import Clock
from router.copying import Copy, copy_blocks
from router.ledger import Attempt, Counts, Entry, Ledger
from router.pairs import PairState
from router.policies.fleet import Fleet, Worker
from router.policies.model import Route
from router.policies.speeds import Line
from router.workers import Workers

MARGIN = 0.8
"""A copy must be foretold to take less than this share of the time that computing takes."""
PATIENCE = 4.0
"""Times what it was foretold to take: after that the prompt is computed instead."""
MIN_PATIENCE_S = 0.25
NUM_HOLDERS = 1


class Puller:
    def __init__(self, flow: Copy, *, workers: Workers, ledger: Ledger, counts: Counts, clock: Clock) -> None:
        self._flow, self._workers, self._ledger, self._counts, self._clock = flow, workers, ledger, counts, clock

    def pull(self, entry: Entry, attempt: Attempt, then: Callable[[], None]) -> None:
        """Bring what pays to the prefill worker; `then` is called once, soon, whether it came or not."""
        fleet, prefill = self._workers.fleet, attempt.ticket.prefill_incarnation
        found = None if attempt.moves or entry.is_copy else self._holder(entry, attempt)
        if found is None:
            then()
            return
        holder, num_blocks, num_gained = found
        route = self._route(holder.incarnation, prefill)
        if route is None:
            then()
            return
        foretold_s = holder.kind.link(fleet.workers[prefill].kind).at(num_gained)
        self._workers.touch(route)
        self._counts.placements["pulled_prefix"] += 1
        over = False

        def on_copied(well: bool) -> None:
            nonlocal over
            if over:
                return
            over = True
            timer.cancel()
            if well:
                attempt.num_to_read -= num_gained
            attempt.since_s = self._clock()
            then()

        def give_up() -> None:
            self._flow.fence(copied, "pull_timeout")
            on_copied(False)

        patience_s = max(MIN_PATIENCE_S, PATIENCE * foretold_s)
        timer = asyncio.get_running_loop().call_later(patience_s, give_up)
        num_tokens = num_blocks * holder.kind.block_size
        copied = copy_blocks(self._flow, self._ledger, self._clock, route, entry.request, num_tokens, on_copied)

    def _holder(self, entry: Entry, attempt: Attempt) -> tuple[Worker, int, int] | None:
        """A decode worker that has more of the prompt than the prefill worker, where it pays to ask for it.

        With how many blocks it has, and how many tokens more that is.
        """
        fleet, ticket = self._workers.fleet, attempt.ticket
        here = fleet.workers.get(ticket.prefill_incarnation)
        if here is None or ticket.local or ticket.kv_wire_dtype != "auto" or not len(fleet.caches):
            return None
        hashes = entry.hashes.of(entry.request, fleet.cache_kinds).get(here.kind.key.cache, ())
        found = most_on_decode_worker(fleet, hashes)
        if found is None:
            return None
        holder, num_blocks = found
        num_gained = (num_blocks - fleet.caches.depth(here.bit, hashes)) * here.kind.block_size
        if holder is here or not pays(num_gained, here.kind.prefill, holder.kind.link(here.kind)):
            return None
        return (holder, num_blocks, num_gained) if holder.open and here.used_credits < here.num_credits else None

    def _route(self, holder: str, prefill: str) -> Route | None:
        """Of a pair that is up; one that is not is connected for the next time, if there is room for it."""
        ways = self._workers.ways_out(holder, PairState.UP)
        route = next((way for way in ways if way.decode == prefill), None)
        if route is None and self._workers.has_room_for(holder, prefill):
            self._workers.want(Route(holder, prefill), self._ledger.pairs_in_use())
        return route


def most_on_decode_worker(fleet: Fleet, hashes: Sequence[bytes]) -> tuple[Worker, int] | None:
    """The decode worker that has most of these blocks, and how many."""
    for num_blocks, bits in fleet.caches.match(hashes, 0, fleet.decode_bits, NUM_HOLDERS):
        if here := bits & fleet.decode_bits:
            return fleet.workers[fleet.caches.name(here & -here)], num_blocks
    return None


def pays(num_gained: int, prefill: Line, link: Line) -> bool:
    """Whether K and V of so many tokens are there sooner when they are copied than when they are computed."""
    return num_gained > 0 and link.at(num_gained) < MARGIN * prefill.slope * num_gained
