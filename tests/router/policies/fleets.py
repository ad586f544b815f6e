"""Fleets of any shape, and a search that looks at every route, to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

from core.messages import WorkerRole
from router.policies import make_policy
from router.policies.fleet import Fleet, KindKey
from router.policies.model import Need, Route, Tuning
from router.policies.search import Policy, num_blocks_for

NAMES = ("round_robin", "least_loaded", "power_of_two", "prefix_aware", "slo_aware", "cost_aware", "mixed_pool")
NEED = Need(num_tokens=100, max_total_tokens=200)


@dataclass(frozen=True)
class Spec:
    """A worker as a test describes it."""

    name: str
    role: str = "mixed"
    block_size: int = 16
    max_model_len: int = 1024
    free_credits: int = 4
    free_blocks: int = 64
    active: int = 0
    waiting: int = 0
    device: str = "cpu"
    runs_alone: bool = False


def policy_of(name: str, **tuning: object) -> Policy:
    return make_policy(name, Tuning(**tuning))  # type: ignore[arg-type]


def fleet_of(*specs: Spec, pairs: Sequence[tuple[str, str]] | None = None) -> Fleet:
    """All pairs up, or those that are given, at epoch 1."""
    fleet = Fleet(1000)
    for spec in specs:
        cache = f"cache{spec.block_size}", spec.block_size
        key = KindKey(WorkerRole(spec.role), spec.device, cache, spec.max_model_len, spec.runs_alone)
        fleet.add(spec.name, key, max(0, spec.free_credits) + spec.active, 0)
        fleet.report(
            spec.name,
            num_free_blocks=spec.free_blocks,
            num_active=spec.active,
            num_waiting_tokens=spec.waiting,
        )
        fleet.book(spec.name, used_credits=spec.active, pending_tokens=0, pending_blocks=0)
    for p in specs:
        for d in specs:
            fits = p is not d and p.role != "decode" and d.role != "prefill"
            if fits and (pairs is None or (p.name, d.name) in pairs):
                fleet.pair_up(p.name, d.name, 1)
    fleet.settle()
    return fleet


@st.composite
def fleets(draw: st.DrawFn, *, runs_alone: bool = True) -> Fleet:
    """Some pairs up, of up to six workers of any load. `runs_alone`: some decode workers do."""
    specs = [
        Spec(
            name=f"w{i}",
            role=draw(st.sampled_from(["prefill", "decode", "mixed"])),
            block_size=draw(st.sampled_from([1, 16])),
            max_model_len=draw(st.sampled_from([32, 128, 1024])),
            free_credits=draw(st.integers(0, 2)),
            free_blocks=draw(st.integers(-2, 130)),
            active=draw(st.integers(0, 3)),
            waiting=draw(st.integers(0, 100)),
            device=draw(st.sampled_from(["slow", "fast"])),
            runs_alone=runs_alone and draw(st.booleans()),
        )
        for i in range(draw(st.integers(0, 6)))
    ]
    possible = [(p.name, d.name) for p in specs for d in specs if p is not d]
    up = draw(st.lists(st.sampled_from(possible), unique=True)) if possible else []
    fleet = fleet_of(*specs, pairs=up)
    for spec in specs:
        if draw(st.integers(0, 7)) == 0:
            fleet.take_no_work(spec.name)
    for kind in fleet.kinds.values():
        if kind.key.device == "fast":
            for num_tokens in (10, 100, 1000):
                kind.prefill.observe(num_tokens, 0.001 + 2e-6 * num_tokens)
    for spec in specs:  # workers report again and again; then their places are those of the speeds known by now
        fleet.book(spec.name, used_credits=spec.active, pending_tokens=0, pending_blocks=0)
    return fleet


@st.composite
def needs(draw: st.DrawFn) -> Need:
    names = st.frozensets(st.sampled_from([f"w{i}" for i in range(6)]), max_size=2)
    num_tokens = draw(st.integers(1, 120))
    limits = st.none() | st.floats(0.001, 10.0)
    return Need(
        num_tokens,
        num_tokens + draw(st.integers(1, 200)),
        avoid=draw(names),
        refused_by=draw(names),
        ttft_s=draw(limits),
        itl_s=draw(limits),
        mode=draw(st.sampled_from(["prefer", "require", "local"])),
    )


def length_of(fleet: Fleet, route: Route) -> int:
    return min(fleet.workers[name].kind.max_model_len for name in (route.prefill, route.decode))


def has_room(need: Need, fleet: Fleet, route: Route) -> bool:
    prefill, decode = fleet.workers[route.prefill], fleet.workers[route.decode]
    fits = num_blocks_for(need.num_tokens + 1, decode.kind.block_size) <= decode.num_free_blocks
    return prefill.open and decode.open and fits and not route.touches(need.refused_by)


def usable_routes(need: Need, fleet: Fleet) -> list[Route]:
    """With room or without: long enough, and without failed workers where that is possible."""
    routes = [*fleet.routes(need.mode)]
    longest = max((length_of(fleet, route) for route in routes), default=0)
    if need.num_tokens + 1 > longest:
        return []
    fitting = [route for route in routes if length_of(fleet, route) >= min(need.max_total_tokens, longest)]
    return [route for route in fitting if not route.touches(need.avoid)] or fitting
