"""What a draining worker decodes moves to others, so that nothing is computed anew (docs/adr/0005)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from core.clock import Clock
from core.events import LifecycleEvent
from router.flow import AttemptFlow
from router.ledger import Attempt, Counts, Entry, Ledger, Stage
from router.pairs import PairState
from router.policies.fleet import Fleet
from router.policies.model import Need, Placement, Route
from router.policies.search import Search, num_blocks_for
from router.workers import Workers

RETRY_S = 1.0
"""After a worker has refused a request: it stops for a moment whenever it tries to move."""
MAX_MOVES = 4
"""Requests that leave one worker at a time: each stops for as long as its K and V take, so the last waits for few."""


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

    def run(self) -> None:
        """Begin what can begin now."""
        for incarnation in self._workers.draining():
            num_free, now_s = MAX_MOVES - len(self._moving(incarnation)), self._clock()
            ready = [entry for entry in self._decoding(incarnation) if now_s - entry.stayed_s >= RETRY_S]
            for entry in ready[: max(0, num_free)]:
                self._move(entry, incarnation)

    def _decoding(self, incarnation: str) -> Iterator[Entry]:
        for hold in self._ledger.holds_on(incarnation):
            attempt = hold.entry.attempt
            if attempt and attempt.ticket is hold.ticket and attempt.stage is Stage.DECODING and not hold.closing:
                yield hold.entry

    def _moving(self, incarnation: str) -> list[Attempt]:
        attempts = [entry.attempt for entry in self._ledger.entries() if entry.attempt and entry.attempt.moves]
        return [a for a in attempts if a.ticket.prefill_incarnation == incarnation and not a.decoding]

    def _move(self, entry: Entry, incarnation: str) -> None:
        need, fleet = self._need(entry), self._workers.fleet
        fleet.settle()
        route = way_out(need, fleet, self._workers.ways_out(incarnation, PairState.UP))
        if route is None:
            if idle := way_out(need, fleet, self._workers.ways_out(incarnation, PairState.IDLE)):
                self._workers.want(idle, self._ledger.pairs_in_use())
            return
        search = Search(need, fleet, longest=need.max_total_tokens, avoid=frozenset())
        forecast = search.forecast(fleet.workers[route.prefill], fleet.workers[route.decode])
        now_s, entry.placement = self._clock(), Placement(route, ("moved", "draining"), "", forecast)
        self._counts.placements.update(entry.placement.reasons)
        self._ledger.note(entry, LifecycleEvent.MOVED, now_s)
        self._ledger.note(entry, LifecycleEvent.PLACED, now_s)
        self._workers.touch(route)
        self._flow.move(entry, route)
        self._book()


def way_out(need: Need, fleet: Fleet, ways: Iterable[Route]) -> Route | None:
    """The one to the least loaded worker that has room for what the request has, and is long enough for the rest."""
    fitting = []
    for route in ways:
        here, there = fleet.workers[route.prefill], fleet.workers[route.decode]
        num_blocks = num_blocks_for(need.num_tokens + 1, there.kind.block_size)
        long_enough = there.kind.max_model_len >= min(need.max_total_tokens, here.kind.max_model_len)
        banned = there.incarnation in need.refused_by or there.incarnation in need.avoid
        if there.open and there.num_free_blocks >= num_blocks and long_enough and not banned:
            fitting.append((there.num_active, -there.num_free_blocks, there.incarnation, route))
    return min(fitting, key=lambda each: each[:3])[3] if fitting else None
