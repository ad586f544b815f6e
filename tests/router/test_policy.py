"""Placement: pure, so every property is checked on clusters of any shape."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from core.messages import WorkerRole
from router.policy import (
    ClusterView,
    Need,
    NoPlacement,
    Placement,
    Route,
    WorkerView,
    load_of,
    num_blocks_for,
    place,
)

ROLES = st.sampled_from(list(WorkerRole))


def worker(name: str, role: WorkerRole = WorkerRole.MIXED, **changes: int) -> WorkerView:
    view = WorkerView(name, role, block_size=16, max_model_len=1024, num_free_credits=4, num_free_blocks=64)
    return replace(view, **changes)  # type: ignore[arg-type]


def cluster(*workers: WorkerView) -> ClusterView:
    """All pairs up, and every mixed worker alone."""
    pairs = [
        Route(p.incarnation, d.incarnation, epoch=1)
        for p in workers
        for d in workers
        if p is not d and p.role is not WorkerRole.DECODE and d.role is not WorkerRole.PREFILL
    ]
    local = [Route(w.incarnation, w.incarnation) for w in workers if w.role is WorkerRole.MIXED]
    return ClusterView({w.incarnation: w for w in workers}, (*pairs, *local))


@st.composite
def clusters(draw: st.DrawFn) -> ClusterView:
    count = draw(st.integers(0, 5))
    workers = [
        WorkerView(
            incarnation=f"w{i}",
            role=draw(ROLES),
            block_size=draw(st.sampled_from([1, 16, 32])),
            max_model_len=draw(st.sampled_from([32, 128, 1024])),
            num_free_credits=draw(st.integers(0, 2)),
            num_free_blocks=draw(st.integers(-2, 30)),
            num_active=draw(st.integers(0, 3)),
            num_waiting_tokens=draw(st.integers(0, 100)),
        )
        for i in range(count)
    ]
    view = cluster(*workers)
    up = draw(st.lists(st.sampled_from(view.routes), unique=True)) if view.routes else []
    return replace(view, routes=tuple(up))


@st.composite
def needs(draw: st.DrawFn) -> Need:
    names = st.frozensets(st.sampled_from([f"w{i}" for i in range(5)]), max_size=2)
    num_tokens = draw(st.integers(1, 120))
    return Need(num_tokens, num_tokens + draw(st.integers(1, 200)), avoid=draw(names), refused_by=draw(names))


def has_room(need: Need, view: ClusterView, route: Route) -> bool:
    prefill, decode = view.workers[route.prefill], view.workers[route.decode]
    fits = num_blocks_for(need.num_tokens + 1, decode.block_size) <= decode.num_free_blocks
    return min(prefill.num_free_credits, decode.num_free_credits) > 0 and fits and not route.touches(need.refused_by)


@given(needs(), clusters())
def test_a_placement_is_on_a_route_that_is_up_and_has_room(need: Need, view: ClusterView) -> None:
    decision = place(need, view)
    if isinstance(decision, Placement):
        assert decision.route in view.routes
        assert has_room(need, view, decision.route)
        assert need.num_tokens + 1 <= view.max_model_len(decision.route)


@given(needs(), clusters())
def test_a_request_waits_only_where_nothing_it_may_use_has_room(need: Need, view: ClusterView) -> None:
    decision = place(need, view)
    if isinstance(decision, NoPlacement):
        longest = max((view.max_model_len(route) for route in view.routes), default=0)
        long_enough = [r for r in view.routes if view.max_model_len(r) >= min(need.max_total_tokens, longest)]
        usable = [r for r in long_enough if not r.touches(need.avoid)] or long_enough
        assert decision.possible == (need.num_tokens < longest)
        assert not decision.possible or not any(has_room(need, view, route) for route in usable)


@given(needs(), clusters())
def test_every_decision_carries_its_reasons(need: Need, view: ClusterView) -> None:
    decision = place(need, view)
    assert decision.reasons
    assert all(reason.isidentifier() for reason in decision.reasons)


@given(needs(), clusters())
def test_no_route_with_room_is_less_loaded_than_the_one_chosen(need: Need, view: ClusterView) -> None:
    free_of_history = replace(need, avoid=frozenset(), max_total_tokens=need.num_tokens + 1)
    decision = place(free_of_history, view)
    if isinstance(decision, Placement):
        others = [r for r in view.routes if has_room(free_of_history, view, r)]
        others = [r for r in others if view.max_model_len(r) > need.num_tokens]
        assert load_of(view, decision.route) == min(load_of(view, route) for route in others)


@given(needs(), clusters())
def test_a_failed_worker_is_used_only_where_every_route_that_fits_has_one(need: Need, view: ClusterView) -> None:
    decision = place(need, view)
    if isinstance(decision, Placement) and decision.route.touches(need.avoid):
        longest = max(view.max_model_len(route) for route in view.routes)
        fitting = [r for r in view.routes if view.max_model_len(r) >= min(need.max_total_tokens, longest)]
        assert all(route.touches(need.avoid) for route in fitting)


@given(needs(), clusters(), st.randoms())
def test_the_order_in_which_workers_came_does_not_matter(need: Need, view: ClusterView, random: st.DataObject) -> None:
    routes = list(view.routes)
    random.shuffle(routes)  # type: ignore[attr-defined]
    assert place(need, replace(view, routes=tuple(routes))) == place(need, view)


# ---- what the properties do not say

NEED = Need(num_tokens=100, max_total_tokens=200)


def test_the_least_loaded_of_each_side_make_the_pair() -> None:
    view = cluster(
        worker("p-busy", WorkerRole.PREFILL, num_waiting_tokens=500),
        worker("p-idle", WorkerRole.PREFILL, num_waiting_tokens=10),
        worker("d-busy", WorkerRole.DECODE, num_active=5),
        worker("d-idle", WorkerRole.DECODE, num_active=1),
    )
    assert place(NEED, view) == Placement(Route("p-idle", "d-idle", 1), ("disaggregated", "least_loaded"))


def test_free_blocks_decide_between_decode_workers_equally_busy() -> None:
    prefill = worker("p", WorkerRole.PREFILL)
    few, many = (worker(name, WorkerRole.DECODE, num_free_blocks=n) for name, n in (("a", 20), ("b", 60)))
    decision = place(NEED, cluster(prefill, few, many))
    assert isinstance(decision, Placement)
    assert decision.route.decode == "b"


def test_a_mixed_worker_alone_goes_before_two_mixed_ones() -> None:
    decision = place(NEED, cluster(worker("a"), worker("b", num_waiting_tokens=1)))
    assert isinstance(decision, Placement)
    assert decision.route == Route("a", "a")
    assert decision.reasons == ("local", "least_loaded")


def test_a_mixed_worker_helps_out_when_the_dedicated_ones_are_full() -> None:
    full = worker("d", WorkerRole.DECODE, num_free_credits=0)
    decision = place(NEED, cluster(worker("p", WorkerRole.PREFILL), full, worker("m")))
    assert isinstance(decision, Placement)
    assert decision.route == Route("p", "m", 1)


def test_blocks_are_asked_for_the_prompt_and_one_token_more() -> None:
    exact = cluster(worker("m", num_free_blocks=7))
    assert isinstance(place(replace(NEED, num_tokens=111), exact), Placement)
    assert place(replace(NEED, num_tokens=112), exact) == NoPlacement(True, ("no_decode_blocks",))


def test_a_worker_long_enough_for_the_whole_answer_is_preferred() -> None:
    short = worker("short", max_model_len=128)
    long = worker("zlong", max_model_len=512, num_active=9)
    decision = place(NEED, cluster(short, long))
    assert isinstance(decision, Placement)
    assert decision.route == Route("zlong", "zlong")


def test_where_nobody_can_hold_the_whole_answer_the_longest_may_begin_it() -> None:
    assert isinstance(place(NEED, cluster(worker("m", max_model_len=150))), Placement)


def test_a_prompt_too_long_for_everybody_is_not_waited_for() -> None:
    assert place(NEED, cluster(worker("m", max_model_len=100))) == NoPlacement(False, ("too_long",))


def test_without_a_route_nothing_is_possible() -> None:
    only_prefill = cluster(worker("p", WorkerRole.PREFILL))
    assert place(NEED, only_prefill) == NoPlacement(False, ("no_route",))


def test_all_that_lacks_is_named() -> None:
    view = cluster(
        worker("p", WorkerRole.PREFILL),
        worker("p-full", WorkerRole.PREFILL, num_free_credits=0),
        worker("d1", WorkerRole.DECODE, num_free_credits=0),
        worker("d2", WorkerRole.DECODE, num_free_blocks=0),
        worker("d3", WorkerRole.DECODE),
    )
    need = replace(NEED, refused_by=frozenset({"d3"}))
    assert place(need, view) == NoPlacement(
        True, ("no_decode_blocks", "no_decode_credit", "no_prefill_credit", "refused")
    )
