"""What a draining worker decodes moves to others, so that nothing is computed anew (docs/adr/0005)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from core.clock import Clock
from core.events import LifecycleEvent
from core.messages import WorkerRole
from router.copying import copy_blocks
from router.flow import AttemptFlow
from router.ledger import Ahead, Counts, Entry, Ledger, Stage
from router.pairs import PairState
from router.policies.fleet import Fleet
from router.policies.model import Need, Placement, Route
from router.policies.search import Search, num_blocks_for
from router.workers import Workers

RETRY_S = 1.0
"""After a worker has refused a request: it stops for a moment whenever it tries to move."""
MAX_MOVES = 4
"""Requests that leave one worker at a time: each stops for as long as its K and V take, so the last waits for few."""
MIN_COPY_TOKENS = 256
"""Fewer are sent at once, when the request stops. More go ahead, while it decodes on."""
MAX_COPY_TOKENS = 2048
"""Sent ahead in one piece: the worker's other requests wait for as long as it takes to copy them out of the cache."""


class Mover:
    """Moves requests away from workers that drain. Who finds no room elsewhere goes on where it is."""

    def __init__(
        self,
        *,
        workers: Workers,
        ledger: Ledger,
        flow: AttemptFlow,
        counts: Counts,
        clock: Clock,
        need: Callable[[Entry], Need],
        book: Callable[[], None],
    ) -> None:
        """`need` says what a request asks for; `book` lets the fleet know what was asked of workers."""
        self._workers, self._ledger, self._flow, self._counts = workers, ledger, flow, counts
        self._clock, self._need, self._book = clock, need, book
        self._version = -1  # of the fleet, when these were found to drain
        self._names: list[str] = []

    def run(self) -> None:
        """Begin what can begin now."""
        for incarnation in self._draining():
            entries, now_s = [*self._decoding(incarnation)], self._clock()
            num_free = MAX_MOVES - self._num_moving(incarnation) - sum(is_busy(entry) for entry in entries)
            ready = [entry for entry in entries if not is_busy(entry) and now_s - entry.stayed_s >= RETRY_S]
            for entry in ready[: max(0, num_free)]:
                self._move(entry, incarnation)

    def _draining(self) -> list[str]:
        """Workers that take no more work; looked for only when that may have changed."""
        fleet = self._workers.fleet
        if self._version != fleet.version:
            self._version, self._names = fleet.version, [name for name, w in fleet.workers.items() if not w.taking]
        return self._names

    def _decoding(self, incarnation: str) -> Iterator[Entry]:
        for hold in self._ledger.holds_on(incarnation):
            attempt = hold.entry.attempt
            if attempt is None or hold.closing or hold.entry.is_copy:
                continue
            if attempt.ticket is hold.ticket and attempt.stage is Stage.DECODING:
                yield hold.entry

    def _num_moving(self, incarnation: str) -> int:
        attempts = [e.attempt for e in self._ledger.entries() if e.attempt and e.attempt.moves and not e.is_copy]
        return sum(a.ticket.prefill_incarnation == incarnation and not a.decoding for a in attempts)

    def _move(self, entry: Entry, incarnation: str) -> None:
        need, fleet = self._need(entry), self._workers.fleet
        fleet.settle()
        ways = self._workers.ways_out(incarnation, PairState.UP)
        begun = [way for way in ways if entry.ahead and entry.ahead.incarnation == way.decode]
        route = way_out(need, fleet, begun) or way_out(need, fleet, ways)
        if route is None:
            if idle := way_out(need, fleet, self._workers.ways_out(incarnation, PairState.IDLE)):
                self._workers.want(idle, self._ledger.pairs_in_use())
            return
        self._workers.touch(route)
        if not self._copies_ahead(entry, route):
            self._move_to(entry, need, route)
        self._book()

    def _copies_ahead(self, entry: Entry, route: Route) -> bool:
        """Whether K and V are on their way ahead of the request, which decodes on meanwhile."""
        here, ahead = self._workers.fleet.workers[route.prefill], entry.ahead
        if ahead is None or ahead.incarnation != route.decode:
            ahead = entry.ahead = Ahead(route.decode)
        block_size = here.kind.block_size
        num_full = (entry.num_tokens - 1) // block_size * block_size
        possible = here.used_credits < here.num_credits and entry.request.kv_wire_dtype == "auto"
        if ahead.failed or not possible or num_full - ahead.num_tokens < MIN_COPY_TOKENS:
            return False
        num_tokens = min(num_full, ahead.num_tokens + max(1, MAX_COPY_TOKENS // block_size) * block_size)

        def on_copied(well: bool) -> None:
            """What did not come goes with the request."""
            ahead.busy, ahead.failed = False, not well
            if well:
                ahead.num_tokens = num_tokens

        ahead.busy = True
        copy_blocks(self._flow, self._ledger, self._clock, route, entry.request, num_tokens, on_copied)
        return True

    def _move_to(self, entry: Entry, need: Need, route: Route) -> None:
        fleet, now_s = self._workers.fleet, self._clock()
        search = Search(need, fleet, longest=need.max_total_tokens, avoid=frozenset())
        forecast = search.forecast(fleet.workers[route.prefill], fleet.workers[route.decode])
        entry.placement = Placement(route, ("moved", "draining"), "", forecast)
        self._counts.placements.update(entry.placement.reasons)
        self._ledger.note(entry, LifecycleEvent.MOVED, now_s)
        self._ledger.note(entry, LifecycleEvent.PLACED, now_s)
        self._flow.move(entry, route)


def is_busy(entry: Entry) -> bool:
    return entry.ahead is not None and entry.ahead.busy


def way_out(need: Need, fleet: Fleet, ways: Iterable[Route]) -> Route | None:
    """The one to the least loaded worker that has room for what the request has, and is long enough for the rest."""
    fitting = []
    for route in ways:
        here, there = fleet.workers[route.prefill], fleet.workers[route.decode]
        num_blocks = num_blocks_for(need.num_tokens + 1, there.kind.block_size)
        long_enough = there.kind.max_model_len >= min(need.max_total_tokens, here.kind.max_model_len)
        decodes = there.role is not WorkerRole.PREFILL
        banned = there.incarnation in need.refused_by or there.incarnation in need.avoid
        if there.open and there.num_free_blocks >= num_blocks and long_enough and decodes and not banned:
            fitting.append((there.num_active, -there.num_free_blocks, there.incarnation, route))
    return min(fitting, key=lambda each: each[:3])[3] if fitting else None
