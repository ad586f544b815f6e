"""What each policy is for."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

from core.block_hash import block_hash, root_hash
from core.messages import CacheChanged
from router.policies.fleet import Fleet
from router.policies.model import Need, Placement, Route
from router.policies.place import place
from router.policies.search import Policy
from tests.router.policies.fleets import NEED, Spec, fleet_of, policy_of

BLOCK_SIZE = 16
CACHE = f"cache{BLOCK_SIZE}", BLOCK_SIZE


def put(policy: Policy, need: Need, fleet: Fleet, seed: int = 0) -> Placement:
    decision = place(policy, need, fleet, random.Random(seed))
    assert isinstance(decision, Placement)
    return decision


def speed(fleet: Fleet, device: str, *, prefill_s: float | None = None, step_s: float | None = None) -> None:
    """Measured seconds: of a prompt token, of a step for each request in the batch."""
    for kind in fleet.kinds.values():
        if kind.key.device == device:
            for x in (1, 8, 64, 512):
                if prefill_s is not None:
                    kind.prefill.observe(x, prefill_s * x)
                if step_s is not None:
                    kind.step.observe(x, step_s * x)


# ---- round robin


def test_round_robin_takes_each_in_turn() -> None:
    fleet = fleet_of(*(Spec(f"p{i}", "prefill") for i in range(3)), *(Spec(f"d{i}", "decode") for i in range(2)))
    policy = policy_of("round_robin")
    routes = [put(policy, NEED, fleet).route for _ in range(6)]
    assert [route.prefill for route in routes] == ["p0", "p1", "p2", "p0", "p1", "p2"]
    assert [route.decode for route in routes] == ["d0", "d1", "d0", "d1", "d0", "d1"]


def test_round_robin_passes_over_who_has_no_room() -> None:
    fleet = fleet_of(Spec("a"), Spec("b", free_credits=0), Spec("c"))
    policy = policy_of("round_robin")
    assert [put(policy, NEED, fleet).route.prefill for _ in range(4)] == ["a", "c", "a", "c"]


# ---- least loaded


def test_the_least_loaded_of_each_side_make_the_pair() -> None:
    fleet = fleet_of(
        Spec("p-busy", "prefill", waiting=500),
        Spec("p-idle", "prefill", waiting=10),
        Spec("d-busy", "decode", active=5),
        Spec("d-idle", "decode", active=1),
    )
    decision = put(policy_of("least_loaded"), NEED, fleet)
    assert (decision.route, decision.reasons) == (Route("p-idle", "d-idle", 1), ("disaggregated", "least_loaded"))


def test_a_fast_worker_with_the_longer_queue_may_be_done_first() -> None:
    fleet = fleet_of(Spec("fast", waiting=900, device="gpu"), Spec("slow", waiting=300))
    speed(fleet, "gpu", prefill_s=1e-5)
    speed(fleet, "cpu", prefill_s=1e-3)
    assert put(policy_of("least_loaded"), NEED, fleet).route.prefill == "fast"


def test_free_blocks_decide_between_decode_workers_equally_busy() -> None:
    fleet = fleet_of(Spec("p", "prefill"), Spec("a", "decode", free_blocks=20), Spec("b", "decode", free_blocks=60))
    assert put(policy_of("least_loaded"), NEED, fleet).route.decode == "b"


def test_of_a_pair_that_is_down_the_next_best_is_taken() -> None:
    specs = Spec("p", "prefill"), Spec("p2", "prefill", waiting=9), Spec("d", "decode"), Spec("d2", "decode", active=1)
    fleet = fleet_of(*specs, pairs=[("p2", "d2")])
    assert put(policy_of("least_loaded"), NEED, fleet).route == Route("p2", "d2", 1)


# ---- power of two choices


def test_the_better_of_two_is_taken() -> None:
    fleet = fleet_of(Spec("busy", waiting=10_000), Spec("idle"))
    taken = Counter(put(policy_of("power_of_two"), NEED, fleet, seed).route.prefill for seed in range(20))
    assert taken["idle"] > taken["busy"] == 0


def test_two_choices_spread_as_one_look_at_all_would() -> None:
    fleet = fleet_of(*(Spec(f"w{i}", free_credits=100, free_blocks=9999) for i in range(10)))
    policy, load, rng = policy_of("power_of_two"), Counter[str](), random.Random(5)
    for _ in range(300):
        decision = place(policy, NEED, fleet, rng)
        assert isinstance(decision, Placement)
        name = decision.route.prefill
        load[name] += 1
        fleet.book(name, used_credits=load[name], pending_tokens=100 * load[name], pending_blocks=0)
    assert min(load.values()) >= 25
    assert max(load.values()) <= 35


# ---- prefix-aware


def chain(num_blocks: int, salt: str = "") -> list[bytes]:
    hashes = [root_hash(CACHE[0], salt)]
    for _ in range(num_blocks):
        hashes.append(block_hash(hashes[-1], range(BLOCK_SIZE)))
    return hashes[1:]


def asking(hashes: list[bytes]) -> Need:
    num_tokens = BLOCK_SIZE * len(hashes) + 1
    return Need(num_tokens, num_tokens + 50, hashes={CACHE: hashes})


def holding(fleet: Fleet, **held: list[bytes]) -> Fleet:
    for name, hashes in held.items():
        fleet.tell(name, CacheChanged(tuple(hashes), cleared=True))
    return fleet


def test_who_has_the_prefix_gets_the_request() -> None:
    hashes = chain(32)
    fleet = holding(fleet_of(*(Spec(f"w{i}") for i in range(5))), w3=hashes, w4=chain(32, "another tenant"))
    decision = put(policy_of("prefix_aware"), asking(hashes), fleet)
    assert (decision.route.prefill, decision.reasons) == ("w3", ("local", "prefix_cached"))
    assert decision.forecast.num_cached_prefill == 512


def test_who_has_more_of_the_prefix_goes_before_who_has_less() -> None:
    hashes = chain(32)
    fleet = holding(fleet_of(*(Spec(f"w{i}") for i in range(5))), w1=hashes[:8], w2=hashes[:24])
    assert put(policy_of("prefix_aware"), asking(hashes), fleet).route.prefill == "w2"


def test_a_queue_longer_than_what_is_saved_is_not_joined() -> None:
    hashes = chain(32)
    fleet = holding(fleet_of(Spec("has", waiting=3000), Spec("idle"), pairs=[]), has=hashes)
    decision = put(policy_of("prefix_aware"), asking(hashes), fleet)
    assert (decision.route.prefill, decision.reasons[1]) == ("idle", "holders_busy")


def test_a_hot_prefix_is_spread_over_all_who_have_it() -> None:
    hashes, names = chain(32), [f"w{i}" for i in range(16)]
    fleet = holding(fleet_of(*map(Spec, names)), **dict.fromkeys(names, hashes))
    policy = policy_of("prefix_aware")
    taken = Counter(put(policy, asking(hashes), fleet, seed).route.prefill for seed in range(200))
    assert len(taken) >= 12
    assert max(taken.values()) < 60


def test_blocks_that_a_decode_worker_has_need_not_be_sent() -> None:
    hashes = chain(40)
    fleet = holding(fleet_of(Spec("p", "prefill"), Spec("d1", "decode"), Spec("d2", "decode")), d2=hashes)
    decision = put(policy_of("prefix_aware"), asking(hashes), fleet)
    assert (decision.route.decode, decision.forecast.num_cached_decode) == ("d2", 640)


def test_without_any_match_it_is_least_loaded() -> None:
    fleet = holding(fleet_of(Spec("a", waiting=50), Spec("b")), a=chain(4, "other"))
    decision = put(policy_of("prefix_aware"), asking(chain(8)), fleet)
    assert (decision.route.prefill, decision.reasons[1]) == ("b", "no_prefix_cached")


# ---- SLO-aware


def test_the_fullest_worker_that_meets_the_targets_is_taken() -> None:
    fleet = fleet_of(Spec("idle"), Spec("half", waiting=4000), Spec("full", waiting=40_000))
    speed(fleet, "cpu", prefill_s=1e-4)
    decision = put(policy_of("slo_aware"), replace(NEED, ttft_s=1.0), fleet)
    assert (decision.route.prefill, decision.reasons[1]) == ("half", "tightest_fit")


def test_urgent_requests_get_the_emptiest() -> None:
    fleet = fleet_of(Spec("idle"), Spec("half", waiting=4000), Spec("full", waiting=40_000))
    speed(fleet, "cpu", prefill_s=1e-4)
    assert put(policy_of("slo_aware"), replace(NEED, ttft_s=0.05), fleet).route.prefill == "idle"


def test_the_gap_between_tokens_is_a_target_too() -> None:
    decodes = Spec("d1", "decode", active=1), Spec("d2", "decode", active=10), Spec("d3", "decode", active=40)
    fleet = fleet_of(Spec("p", "prefill"), *decodes)
    speed(fleet, "cpu", step_s=1e-3)
    assert put(policy_of("slo_aware"), replace(NEED, itl_s=0.02), fleet).route.decode == "d2"


def test_targets_out_of_reach_are_missed_by_as_little_as_can_be() -> None:
    fleet = fleet_of(Spec("busy", waiting=9000), Spec("less", waiting=3000))
    decision = put(policy_of("slo_aware"), replace(NEED, ttft_s=0.001), fleet)
    assert (decision.route.prefill, decision.reasons[1]) == ("less", "slo_out_of_reach")


# ---- cost-aware


def test_the_cheaper_hardware_is_taken_where_it_is_fast_enough() -> None:
    fleet = fleet_of(Spec("dear", device="gpu"), Spec("cheap"))
    speed(fleet, "gpu", prefill_s=1e-5, step_s=1e-4)
    speed(fleet, "cpu", prefill_s=2e-5, step_s=2e-4)
    policy = policy_of("cost_aware", device_prices={"gpu": 10.0, "cpu": 1.0})
    assert put(policy, NEED, fleet).reasons == ("local", "cheapest")
    assert put(policy, NEED, fleet).route.prefill == "cheap"
    assert put(policy, replace(NEED, itl_s=2e-4), fleet).route.prefill == "dear"


def test_fast_hardware_is_the_cheaper_one_where_it_needs_so_much_less_time() -> None:
    fleet = fleet_of(Spec("dear", device="gpu"), Spec("cheap"))
    speed(fleet, "gpu", prefill_s=1e-6, step_s=1e-5)
    speed(fleet, "cpu", prefill_s=1e-3, step_s=1e-2)
    policy = policy_of("cost_aware", device_prices={"gpu": 10.0})
    assert put(policy, NEED, fleet).route.prefill == "dear"


def test_money_is_not_saved_by_waiting_long() -> None:
    fleet = fleet_of(Spec("dear", device="gpu"), Spec("cheap", waiting=100_000))
    policy = policy_of("cost_aware", device_prices={"gpu": 10.0}, overflow_s=0.5)
    assert put(policy, NEED, fleet).route.prefill == "dear"


# ---- the mixed pool


def test_mixed_workers_are_kept_while_the_dedicated_can_do_it() -> None:
    fleet = fleet_of(Spec("m"), Spec("p", "prefill", waiting=100), Spec("d", "decode", active=2))
    decision = put(policy_of("mixed_pool"), NEED, fleet)
    assert (decision.route, decision.reasons) == (Route("p", "d", 1), ("disaggregated", "own_pools"))


def test_prompts_that_would_wait_too_long_overflow_into_mixed_workers() -> None:
    fleet = fleet_of(Spec("m"), Spec("p", "prefill", waiting=20_000), Spec("d", "decode"))
    decision = put(policy_of("mixed_pool", overflow_s=0.5), NEED, fleet)
    assert (decision.route.prefill, decision.reasons[1]) == ("m", "prompts_overflow")


def test_tokens_overflow_into_mixed_workers_when_the_token_pool_is_full() -> None:
    fleet = fleet_of(Spec("m"), Spec("p", "prefill"), Spec("d", "decode", free_credits=0))
    decision = put(policy_of("mixed_pool"), NEED, fleet)
    assert (decision.route, decision.reasons[1]) == (Route("p", "m", 1), "tokens_overflow")


def test_where_all_pools_are_late_the_earliest_end_counts() -> None:
    fleet = fleet_of(Spec("m", free_credits=0), Spec("p", "prefill", waiting=20_000), Spec("d", "decode"))
    decision = put(policy_of("mixed_pool"), NEED, fleet)
    assert (decision.route, decision.reasons[1]) == (Route("p", "d", 1), "all_overflow")
