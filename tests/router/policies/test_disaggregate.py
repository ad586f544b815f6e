"""Apart or together: each request where it costs least, as asked, and with whatever is there."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.messages import CacheChanged
from core.request import Disaggregation
from router.policies.fleet import Fleet
from router.policies.model import Need, NoPlacement, Placement
from router.policies.place import place
from tests.router.policies.fleets import NAMES, Spec, fleet_of, policy_of
from tests.router.policies.test_policies import CACHE, chain

PAIR = Spec("p", "prefill", free_blocks=9999), Spec("d", "decode", free_blocks=9999, runs_alone=True)


def cluster(*specs: Spec, read_s: float = 1e-3, step_s: float = 1e-2, handover_s: float = 0.05) -> Fleet:
    """Measured: seconds a prompt token, a step, a handover."""
    fleet = fleet_of(*(replace(spec, max_model_len=100_000) for spec in specs or PAIR))
    for kind in fleet.kinds.values():
        for x in (1, 10, 100, 1000, 10_000):
            kind.prefill.observe(x, read_s * x)
            kind.step.observe(x, step_s)
            for other in fleet.kinds.values():
                kind.link(other).observe(x, handover_s)
    return fleet


def decide(fleet: Fleet, need: Need, name: str = "least_loaded") -> Placement | NoPlacement:
    return place(policy_of(name), need, fleet, random.Random(0))


def local(fleet: Fleet, num_tokens: int, **changes: object) -> bool:
    need = replace(Need(num_tokens, num_tokens + 50), **changes)  # type: ignore[arg-type]
    decision = decide(fleet, need)
    assert isinstance(decision, Placement)
    return decision.route.local


def test_nobody_is_disturbed_on_an_idle_worker_so_nothing_is_sent() -> None:
    assert local(cluster(), 20)


def test_long_prompts_do_not_stall_those_who_decode() -> None:
    busy = cluster(PAIR[0], replace(PAIR[1], active=4))
    assert local(busy, 5)
    assert not local(busy, 500)


def test_a_prompt_goes_where_it_need_not_wait() -> None:
    assert local(cluster(replace(PAIR[0], waiting=4000), PAIR[1]), 500)
    assert not local(cluster(PAIR[0], replace(PAIR[1], waiting=4000)), 500)


def test_a_slow_link_keeps_requests_together() -> None:
    busy = PAIR[0], replace(PAIR[1], active=4)
    assert not local(cluster(*busy, handover_s=0.01), 50)
    assert local(cluster(*busy, handover_s=2.0), 50)


def test_what_the_decode_worker_has_already_is_read_there() -> None:
    hashes = chain(64)
    need = Need(64 * 16 + 5, 64 * 16 + 50, hashes={CACHE: hashes})
    fleet = cluster(PAIR[0], replace(PAIR[1], active=4))
    fleet.tell("d", CacheChanged(cleared=True))
    apart = decide(fleet, need)
    fleet.tell("d", CacheChanged(tuple(hashes)))
    together = decide(fleet, need)
    assert isinstance(apart, Placement)
    assert isinstance(together, Placement)
    assert not apart.route.local
    assert together.reasons == ("local", "cached_here")


def test_a_target_for_the_gap_between_tokens_is_not_broken_for_one_prompt() -> None:
    fleet = cluster(PAIR[0], replace(PAIR[1], active=1), handover_s=10.0)
    assert local(fleet, 200)
    assert not local(fleet, 200, itl_s=0.1)
    assert local(fleet, 20, itl_s=0.1)


@given(st.integers(0, 40), st.integers(0, 20_000), st.integers(0, 20_000), st.floats(1e-6, 1e-2), st.floats(1e-4, 1.0))
def test_the_longer_the_prompt_the_more_is_gained_apart(
    active: int, waiting_p: int, waiting_d: int, read_s: float, handover_s: float
) -> None:
    """There is one length from which on requests are disaggregated, or they all are, or none."""
    specs = replace(PAIR[0], waiting=waiting_p), replace(PAIR[1], waiting=waiting_d, active=active)
    fleet = cluster(*specs, read_s=read_s, handover_s=handover_s)
    choices = [local(fleet, 2**i) for i in range(13)]
    assert choices == sorted(choices, reverse=True)


@given(st.integers(1, 4000), st.floats(1e-6, 1e-2), st.floats(1e-4, 1.0))
def test_the_more_decode_the_less_is_read_beside_them(num_tokens: int, read_s: float, handover_s: float) -> None:
    choices = [
        local(cluster(PAIR[0], replace(PAIR[1], active=active), read_s=read_s, handover_s=handover_s), num_tokens)
        for active in (0, 1, 4, 16, 64)
    ]
    assert choices == sorted(choices, reverse=True)


# ---- as asked


@pytest.mark.parametrize("name", NAMES)
def test_whoever_requires_two_workers_gets_two(name: str) -> None:
    for fleet in (cluster(), cluster(PAIR[0], Spec("m"), Spec("m2"))):
        decision = decide(fleet, Need(20, 40, mode="require"), name)
        assert isinstance(decision, Placement)
        assert not decision.route.local


@pytest.mark.parametrize("name", NAMES)
def test_whoever_asks_for_one_worker_gets_one(name: str) -> None:
    for fleet in (cluster(PAIR[0], replace(PAIR[1], active=60)), cluster(PAIR[0], Spec("m"), Spec("m2"))):
        decision = decide(fleet, Need(500, 600, mode="local"), name)
        assert isinstance(decision, Placement)
        assert decision.reasons == ("local", "asked_for")


@pytest.mark.parametrize(
    ("mode", "possible"), [("require", NoPlacement(False, ("no_route",))), ("prefer", None), ("local", None)]
)
def test_without_prefill_workers_decode_workers_do_it_all_unless_two_are_required(
    mode: Disaggregation, possible: NoPlacement | None
) -> None:
    decision = decide(cluster(PAIR[1]), Need(500, 600, mode=mode))
    assert decision == possible or (possible is None and isinstance(decision, Placement))


def test_a_full_prefill_pool_is_helped_out() -> None:
    decision = decide(cluster(replace(PAIR[0], free_credits=0), PAIR[1]), Need(500, 600))
    assert isinstance(decision, Placement)
    assert decision.reasons == ("local", "no_pair_has_room")


def test_a_decode_worker_that_takes_no_prompts_is_given_none() -> None:
    fleet = cluster(PAIR[0], replace(PAIR[1], runs_alone=False))
    assert not local(fleet, 5)
    assert decide(fleet, Need(5, 9, mode="local")) == NoPlacement(False, ("no_route",))
