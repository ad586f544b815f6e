"""Where a request goes: pure, so that the simulator places with the very same code.

A *route* is a prefill and a decode worker whose channel is up, or one mixed worker for both halves. Of the routes that
have room now the least loaded wins; dedicated workers go before mixed ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from core.messages import WorkerRole


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker that takes new work, as the router knows it.

    `num_free_blocks` is what the worker last said, less what was asked of it since. `num_active` counts the requests it
    holds, `num_waiting_tokens` prompt tokens it has not computed.
    """

    incarnation: str
    role: WorkerRole
    block_size: int
    max_model_len: int
    num_free_credits: int
    num_free_blocks: int
    num_active: int = 0
    num_waiting_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Route:
    """Incarnations of the two workers; equal for a local route, which has no pair and so no epoch."""

    prefill: str
    decode: str
    epoch: int = 0

    @property
    def local(self) -> bool:
        return self.prefill == self.decode

    def touches(self, incarnations: frozenset[str]) -> bool:
        return self.prefill in incarnations or self.decode in incarnations


@dataclass(frozen=True, slots=True)
class ClusterView:
    """`workers` by incarnation holds at least those that `routes` name."""

    workers: Mapping[str, WorkerView]
    routes: tuple[Route, ...]

    def max_model_len(self, route: Route) -> int:
        return min(self.workers[route.prefill].max_model_len, self.workers[route.decode].max_model_len)


@dataclass(frozen=True, slots=True)
class Need:
    """What a request asks for.

    `num_tokens` are to be prefilled, `max_total_tokens` is where the request may end. Workers in `avoid` failed it;
    those in `refused_by` had no room and have not changed since.
    """

    num_tokens: int
    max_total_tokens: int
    avoid: frozenset[str] = frozenset()
    refused_by: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Placement:
    """`reasons` are machine-readable: they label metrics."""

    route: Route
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NoPlacement:
    """`possible`: a route exists and will do once it has room. Else only a change of the cluster can help."""

    possible: bool
    reasons: tuple[str, ...]


def place(need: Need, view: ClusterView) -> Placement | NoPlacement:
    """The least loaded of the routes that have room for `need` now."""
    if not view.routes:
        return NoPlacement(False, ("no_route",))
    fitting = fitting_routes(need, view)
    if not fitting:
        return NoPlacement(False, ("too_long",))
    candidates = [route for route in fitting if not route.touches(need.avoid)] or fitting
    lacks = {route: what_lacks(need, view, route) for route in candidates}
    free = [route for route in candidates if lacks[route] is None]
    if not free:
        return NoPlacement(True, tuple(sorted({lack for lack in lacks.values() if lack})))
    best = min(free, key=lambda route: load_of(view, route))
    return Placement(best, tuple(explain(best, free, avoided=len(candidates) < len(fitting))))


def fitting_routes(need: Need, view: ClusterView) -> list[Route]:
    """Routes whose workers are long enough to run the request to its end, or to the longest end there is.

    Empty where no worker could hold even the prompt and one token more.
    """
    longest = max(map(view.max_model_len, view.routes), default=0)
    if need.num_tokens + 1 > longest:
        return []
    return [route for route in view.routes if view.max_model_len(route) >= min(need.max_total_tokens, longest)]


def what_lacks(need: Need, view: ClusterView, route: Route) -> str | None:
    """Why the route can't take the request now, or None where it can."""
    prefill, decode = view.workers[route.prefill], view.workers[route.decode]
    if route.touches(need.refused_by):
        return "refused"
    if prefill.num_free_credits < 1:
        return "no_prefill_credit"
    if decode.num_free_credits < 1:
        return "no_decode_credit"
    if decode.num_free_blocks < num_blocks_for(need.num_tokens + 1, decode.block_size):
        return "no_decode_blocks"
    return None


def load_of(view: ClusterView, route: Route) -> tuple[int, int, int, int, str, str]:
    """Sorts routes, the best first. Ends in the names, so that equal views give equal decisions."""
    prefill, decode = view.workers[route.prefill], view.workers[route.decode]
    return (
        preference(prefill.role, decode.role, local=route.local),
        prefill.num_waiting_tokens,
        decode.num_active,
        -decode.num_free_blocks,
        route.prefill,
        route.decode,
    )


def preference(prefill: WorkerRole, decode: WorkerRole, *, local: bool) -> int:
    """0 is best: two dedicated workers, then one of them, then a mixed worker alone, then two mixed ones."""
    num_mixed = (prefill, decode).count(WorkerRole.MIXED)
    return 2 if local else (0, 1, 3)[num_mixed]


def explain(best: Route, free: Iterable[Route], *, avoided: bool) -> Iterable[str]:
    yield "local" if best.local else "disaggregated"
    yield "only_choice" if [*free] == [best] else "least_loaded"
    if avoided:
        yield "avoided_failed_worker"


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)
