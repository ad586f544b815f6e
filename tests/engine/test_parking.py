"""Requests that give way are kept in host memory and go on from there."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.request import Request, RequestState
from core.sampling import SamplingParams
from engine.block_pool import BlockPool
from engine.growth import GrowthForecast
from engine.plan import Drawn, Plan, StepResult, Swap
from engine.prefix_index import PrefixIndex
from engine.scheduler import Scheduler

ANY = 7


def make(
    num_blocks: int, num_host_blocks: int = 100, *, caching: bool = False, forecasting: bool = False
) -> tuple[Scheduler, BlockPool]:
    pool = BlockPool(num_blocks, 4, PrefixIndex("m", 4) if caching else None)
    return Scheduler(
        pool,
        max_num_batched_tokens=64,
        max_num_seqs=8,
        max_model_len=4 * num_blocks,
        forecast=GrowthForecast(4, 4 * num_blocks) if forecasting else None,
        num_host_blocks=num_host_blocks,
    ), pool


def request(name: str, num_prompt: int, max_tokens: int = 100) -> Request:
    """Each prompt is like no other."""
    return Request(name, [100 * (1 + ord(name[0])) + i for i in range(num_prompt)], SamplingParams(max_tokens))


def step(scheduler: Scheduler) -> Plan:
    plan = scheduler.schedule()
    draws = {entry.request_id: Drawn((ANY,)) for entry in plan.entries if entry.sampling is not None}
    scheduler.update(plan, StepResult(draws))
    scheduler.check_integrity()
    return plan


def crowded(scheduler: Scheduler, *names: str) -> Plan:
    """Each fills two blocks; then the oldest needs a third."""
    for name in names:
        scheduler.add(request(name, 6))
    for _ in range(3):
        step(scheduler)
    return scheduler.schedule()


def finish(scheduler: Scheduler, plan: Plan) -> None:
    scheduler.update(plan, StepResult({entry.request_id: Drawn((ANY,)) for entry in plan.entries}))
    scheduler.check_integrity()


def test_who_gives_way_is_copied_out_and_comes_back_where_it_was() -> None:
    scheduler, pool = make(4)
    scheduler.add(request("a", 6))
    scheduler.add(request("b", 6))
    step(scheduler)
    table = pool.table("b")
    step(scheduler)
    step(scheduler)
    out = step(scheduler)
    assert (out.swaps_out, out.preempted) == ((Swap("b", table, (0, 1)),), ())
    assert scheduler.requests["b"].state is RequestState.PARKED
    assert (pool.table("b"), scheduler.num_parked, scheduler.num_waiting) == ((), 1, 0)
    assert scheduler.parking_counts == (2, 1, 0)
    scheduler.release("a")
    back = step(scheduler)
    assert back.swaps_in == (Swap("b", pool.table("b")[:2], (0, 1)),)
    assert [(entry.request_id, entry.start, entry.end) for entry in back.entries] == [("b", 8, 9)]
    assert scheduler.parking_counts == (0, 1, 0)
    assert (scheduler.num_parked, scheduler.num_preemptions) == (0, 1)


def test_what_is_still_in_the_cache_is_not_copied_back() -> None:
    """Of two full blocks one was handed out anew, to the request that needed it."""
    scheduler, pool = make(4, caching=True)
    finish(scheduler, crowded(scheduler, "a", "b"))
    scheduler.release("a")
    back = step(scheduler)
    assert back.swaps_in == (Swap("b", pool.table("b")[1:2], (1,)),)
    assert back.entries[0].start == 8
    assert scheduler.parking_counts.num_held_blocks == 0


def test_what_was_copied_back_is_found_by_others_when_the_step_is_over() -> None:
    scheduler, pool = make(4, caching=True)
    finish(scheduler, crowded(scheduler, "a", "b"))
    while "a" in scheduler.requests:  # until it has all blocks
        step(scheduler)
    back = scheduler.schedule()
    assert len(back.swaps_in[0].block_ids) == 2
    same = Request("same", scheduler.requests["b"].token_ids(0, 8), SamplingParams(10))
    assert pool.index is not None
    assert pool.index.find(same) == ()
    finish(scheduler, back)
    assert pool.index.find(same) == pool.table("b")[:1]


def test_where_host_memory_is_full_the_youngest_computes_anew() -> None:
    scheduler, _ = make(6, num_host_blocks=3)
    plan = crowded(scheduler, "a", "b", "c")
    assert ([swap.request_id for swap in plan.swaps_out], plan.preempted) == (["c"], ())
    finish(scheduler, plan)
    while not scheduler.parking_counts.num_recomputes:
        plan = step(scheduler)
    assert plan.preempted == ("b",)
    assert [r.state for r in scheduler.requests.values()] == [
        RequestState.RUNNING,
        RequestState.WAITING,
        RequestState.PARKED,
    ]


def test_the_oldest_comes_back_first_though_the_younger_would_fit() -> None:
    scheduler, _ = make(6)
    plan = crowded(scheduler, "a", "b", "c")
    finish(scheduler, plan)
    scheduler.add(request("late", 1))
    while scheduler.num_parked < 2:
        step(scheduler)
    assert [r.request_id for r in scheduler._waiting] == ["b", "c", "late"]
    scheduler.release("a")
    assert step(scheduler).swaps_in[0].request_id == "b"


@pytest.mark.parametrize("caching", [False, True])
def test_one_that_is_released_while_it_is_parked_holds_nothing(caching: bool) -> None:
    scheduler, pool = make(4, caching=caching)
    plan = crowded(scheduler, "a", "b")
    assert scheduler.release("b")
    assert scheduler.parking_counts.num_held_blocks == scheduler.num_parked == 0
    finish(scheduler, plan)
    scheduler.release("a")
    scheduler.check_integrity()
    assert pool.num_free_blocks == pool.num_blocks


def test_a_copy_that_failed_is_not_used() -> None:
    scheduler, _ = make(4)
    plan = crowded(scheduler, "a", "b")
    assert [r.request_id for r in scheduler.abandon(plan)] == ["a"]
    scheduler.check_integrity()
    assert (scheduler.parking_counts.num_held_blocks, scheduler.parking_counts.num_recomputes) == (0, 1)
    again = step(scheduler)
    assert (again.swaps_in, again.entries[0].start, again.entries[0].end) == ((), 0, 9)


def test_nothing_is_reserved_in_blocks_that_a_step_is_still_to_copy_out() -> None:
    scheduler, pool = make(4)
    plan = crowded(scheduler, "a", "b")
    assert pool.num_free_blocks == 1
    assert not scheduler.reserve(request("r", 1))
    finish(scheduler, plan)
    scheduler.release("b")
    assert scheduler.reserve(request("r", 1))


def test_a_reservation_takes_no_room_from_those_who_are_parked() -> None:
    scheduler, _ = make(4)
    finish(scheduler, crowded(scheduler, "a", "b"))
    assert not scheduler.reserve(request("r", 1))


def test_a_prompt_that_gives_way_half_computed_goes_on_from_there() -> None:
    pool = BlockPool(6, 4)
    scheduler = Scheduler(pool, max_num_batched_tokens=5, max_num_seqs=4, max_model_len=24, num_host_blocks=9)
    scheduler.reserve(request("a", 7))
    scheduler.join("a", ANY)
    scheduler.add(request("b", 14))
    step(scheduler)
    plan = step(scheduler)
    assert [(s.request_id, len(s.block_ids)) for s in plan.swaps_out] == [("b", 1)]
    scheduler.release("a")
    assert [(e.request_id, e.start, e.end) for e in step(scheduler).entries] == [("b", 4, 9)]


def test_a_request_that_has_computed_nothing_is_not_parked() -> None:
    pool = BlockPool(4, 4)
    scheduler = Scheduler(pool, max_num_batched_tokens=1, max_num_seqs=1, max_model_len=16, num_host_blocks=9)
    scheduler.reserve(request("a", 7))
    scheduler.join("a", ANY)
    assert scheduler.parking_counts.num_recomputes == 0


@given(lengths=st.lists(st.integers(1, 60), min_size=4, max_size=12), num_blocks=st.integers(20, 40))
def test_who_comes_back_stays_for_a_block_of_tokens_at_least(lengths: list[int], num_blocks: int) -> None:
    """So what the copies cost is spread over many steps, however wrong the forecast was."""
    scheduler, _ = make(num_blocks, forecasting=True)
    for i, length in enumerate(lengths):
        scheduler.add(request(chr(ord("a") + i), 5, max_tokens=length))
    came_back: dict[str, int] = {}
    for number in range(2000):
        if not scheduler.requests:
            return
        plan = step(scheduler)
        came_back |= {swap.request_id: number for swap in plan.swaps_in}
        assert all(number - came_back.get(swap.request_id, -9) >= 4 for swap in plan.swaps_out)
    pytest.fail("the scheduler does not come to an end")
