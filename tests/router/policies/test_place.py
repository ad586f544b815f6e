"""What holds for every policy, on fleets of any shape."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ConfigError
from router.policies import POLICIES, make_policy
from router.policies.fleet import Fleet
from router.policies.model import Need, NoPlacement, Placement, Route, Tuning
from router.policies.place import place
from tests.router.policies.fleets import (
    NAMES,
    NEED,
    Spec,
    fleet_of,
    fleets,
    has_room,
    length_of,
    needs,
    policy_of,
    usable_routes,
)

policies = st.sampled_from(NAMES)


@given(policies, needs(), fleets(), st.integers(0, 99))
def test_a_placement_is_on_a_route_that_is_up_and_has_room(name: str, need: Need, fleet: Fleet, seed: int) -> None:
    decision = place(policy_of(name), need, fleet, random.Random(seed))
    if isinstance(decision, Placement):
        assert decision.route in set(fleet.routes(need.mode))
        assert has_room(need, fleet, decision.route)
        assert decision.route in usable_routes(need, fleet)


@given(policies, needs(), fleets(), st.integers(0, 99))
def test_a_request_waits_only_where_nothing_it_may_use_has_room(name: str, need: Need, fleet: Fleet, seed: int) -> None:
    decision = place(policy_of(name), need, fleet, random.Random(seed))
    if isinstance(decision, NoPlacement):
        usable = usable_routes(need, fleet)
        assert decision.possible == bool(usable)
        assert not any(has_room(need, fleet, route) for route in usable)


@given(policies, needs(), fleets(), st.integers(0, 99))
def test_every_decision_carries_its_reasons(name: str, need: Need, fleet: Fleet, seed: int) -> None:
    decision = place(policy_of(name), need, fleet, random.Random(seed))
    assert decision.reasons
    assert all(reason.isidentifier() for reason in decision.reasons)


@given(policies, needs(), fleets(), st.integers(0, 99))
def test_the_same_seed_gives_the_same_decision(name: str, need: Need, fleet: Fleet, seed: int) -> None:
    once, again = (place(policy_of(name), need, fleet, random.Random(seed)) for _ in range(2))
    assert once == again


@given(needs(), fleets(runs_alone=False))
def test_no_route_with_room_is_predicted_to_finish_before_the_least_loaded(need: Need, fleet: Fleet) -> None:
    need = replace(need, mode="require" if need.mode == "local" else need.mode)
    decision = place(policy_of("least_loaded"), need, fleet, random.Random(0))
    if isinstance(decision, Placement) and decision.reasons[1] == "least_loaded":
        ends = [finish_s(need, fleet, r) for r in usable_routes(need, fleet) if has_room(need, fleet, r)]
        assert finish_s(need, fleet, decision.route) <= min(ends) + 1e-9
        assert abs(decision.forecast.finish_s - finish_s(need, fleet, decision.route)) < 1e-9


def finish_s(need: Need, fleet: Fleet, route: Route) -> float:
    p, d = fleet.workers[route.prefill], fleet.workers[route.decode]
    read_s = p.kind.prefill.at(need.num_tokens + p.num_waiting_tokens)
    sent_s = 0.0 if route.local else p.kind.link(d.kind).at(need.num_tokens)
    num_output = min(fleet.output_tokens.value, need.max_total_tokens - need.num_tokens)
    return read_s + sent_s + d.kind.step.at(d.num_active + 1) * num_output


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_goes_by_its_name(name: str) -> None:
    assert make_policy(name, Tuning()).name == name.replace("cache_aware", "prefix_aware")


def test_an_unknown_policy_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'least_loaded'"):
        make_policy("least_load", Tuning())


# ---- what the properties do not say


def decide(need: Need, *specs: Spec, name: str = "least_loaded") -> Placement | NoPlacement:
    return place(policy_of(name), need, fleet_of(*specs), random.Random(0))


def test_blocks_are_asked_for_the_prompt_and_one_token_more() -> None:
    exact = Spec("m", free_blocks=7)
    assert isinstance(decide(replace(NEED, num_tokens=111), exact), Placement)
    assert decide(replace(NEED, num_tokens=112), exact) == NoPlacement(True, ("no_decode_blocks",))


def test_a_worker_long_enough_for_the_whole_answer_is_preferred() -> None:
    decision = decide(NEED, Spec("short", max_model_len=128), Spec("zlong", max_model_len=512, active=9))
    assert isinstance(decision, Placement)
    assert decision.route == Route("zlong", "zlong")


def test_where_nobody_can_hold_the_whole_answer_the_longest_may_begin_it() -> None:
    assert isinstance(decide(NEED, Spec("m", max_model_len=150)), Placement)


def test_a_prompt_too_long_for_everybody_is_not_waited_for() -> None:
    assert decide(NEED, Spec("m", max_model_len=100)) == NoPlacement(False, ("too_long",))


def test_without_a_route_nothing_is_possible() -> None:
    assert decide(NEED, Spec("p", "prefill")) == NoPlacement(False, ("no_route",))


def test_all_that_lacks_is_named() -> None:
    need = replace(NEED, refused_by=frozenset({"d3"}))
    lacking = decide(
        need,
        Spec("p", "prefill"),
        Spec("p-full", "prefill", free_credits=0),
        Spec("d1", "decode", free_credits=0),
        Spec("d2", "decode", free_blocks=0),
        Spec("d3", "decode"),
    )
    assert lacking == NoPlacement(True, ("no_decode_blocks", "no_decode_credit", "no_prefill_credit", "refused"))


def test_length_counts_both_workers_of_a_pair() -> None:
    fleet = fleet_of(Spec("p", "prefill", max_model_len=64), Spec("d", "decode", max_model_len=32))
    (route,) = fleet.routes()
    assert length_of(fleet, route) == fleet.longest_route("require") == 32
