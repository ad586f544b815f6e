"""Prefixes that are found again: by whom, how much of them, and what is told of it."""

import pytest

from core.errors import IntegrityError
from core.messages import CacheChanged
from core.request import Request
from core.sampling import SamplingParams
from engine.block_pool import BlockPool
from engine.plan import Drawn, Plan, StepResult
from engine.prefix_index import PrefixIndex
from engine.scheduler import Scheduler

PROMPT = list(range(1, 11))


def make(num_blocks: int = 8, caching: bool = True) -> Scheduler:
    """Blocks of 4 tokens."""
    pool = BlockPool(num_blocks, 4, PrefixIndex("m", 4) if caching else None)
    return Scheduler(pool, max_num_batched_tokens=32, max_num_seqs=8, max_model_len=num_blocks * 4)


def request(name: str, prompt: list[int], max_tokens: int = 1, salt: str = "") -> Request:
    return Request(name, list(prompt), SamplingParams(max_tokens=max_tokens), cache_salt=salt)


def step(scheduler: Scheduler, token_id: int = 7) -> Plan:
    plan = scheduler.schedule()
    drawn = {e.request_id: Drawn((token_id,)) for e in plan.entries if e.sampling is not None}
    scheduler.update(plan, StepResult(drawn))
    scheduler.check_integrity()
    return plan


def serve(scheduler: Scheduler, request: Request) -> int:
    """Run the request to its end; returns how many positions were computed."""
    scheduler.add(request)
    num_computed = 0
    for _ in range(100):
        num_computed += step(scheduler).num_tokens
        if request.finish_reason is not None:
            return num_computed
    pytest.fail("the request does not come to its end")


def index(scheduler: Scheduler) -> PrefixIndex:
    found = scheduler._pool.index
    assert found is not None
    return found


def test_a_prompt_that_was_served_before_is_computed_from_its_last_block_on() -> None:
    scheduler = make()
    again = request("b", PROMPT)
    assert (serve(scheduler, request("a", PROMPT)), serve(scheduler, again)) == (10, 2)
    assert again.num_cached_tokens == 8


def test_the_last_token_is_computed_though_all_blocks_are_known() -> None:
    scheduler = make()
    serve(scheduler, request("a", PROMPT[:8]))
    assert serve(scheduler, request("b", PROMPT[:8])) == 4


def test_the_block_that_is_computed_again_is_not_the_shared_one() -> None:
    scheduler = make()
    scheduler.add(request("a", PROMPT[:8], max_tokens=9))
    step(scheduler)
    scheduler.add(request("b", PROMPT[:8], max_tokens=9))
    step(scheduler)
    tables = [scheduler._pool.table(name) for name in "ab"]
    assert tables[0][0] == tables[1][0]
    assert set(tables[0][1:]).isdisjoint(tables[1][1:])


def test_a_prefix_is_shared_up_to_the_first_block_that_differs() -> None:
    scheduler = make()
    serve(scheduler, request("a", PROMPT))
    assert serve(scheduler, request("b", [*PROMPT[:4], 99, *PROMPT[5:]])) == 6


def test_generated_tokens_are_found_too() -> None:
    scheduler = make()
    first = request("a", PROMPT, max_tokens=7)
    serve(scheduler, first)
    known = first.token_ids(0, first.num_tokens)  # 17, the last of which was never computed
    assert serve(scheduler, request("b", known)) == 1


def test_a_chunk_of_a_prompt_is_found_before_the_prompt_is_done() -> None:
    scheduler = make(num_blocks=32)
    long = list(range(100, 160))
    scheduler.add(request("a", long))
    step(scheduler)
    follower = request("b", long)
    scheduler.add(follower)
    step(scheduler)
    assert follower.num_cached_tokens == 32


def test_another_salt_finds_nothing() -> None:
    scheduler = make()
    serve(scheduler, request("a", PROMPT, salt="one"))
    assert serve(scheduler, request("b", PROMPT, salt="two")) == 10
    assert serve(scheduler, request("c", PROMPT, salt="one")) == 2


def test_without_an_index_nothing_is_found() -> None:
    scheduler = make(caching=False)
    assert [serve(scheduler, request(name, PROMPT)) for name in "ab"] == [10, 10]


def test_a_preempted_request_finds_its_own_blocks_again() -> None:
    scheduler = make(num_blocks=4)
    a, b = request("a", [1] * 7, max_tokens=9), request("b", [2] * 6, max_tokens=9)
    scheduler.add(a)
    scheduler.add(b)
    for _ in range(3):
        plan = step(scheduler)
    assert plan.preempted == ("b",)
    scheduler.release("a")
    plan = step(scheduler)
    assert [(entry.request_id, entry.start) for entry in plan.entries] == [("b", 4)]


def test_blocks_of_the_longest_gone_are_handed_out_first_and_their_ends_before_their_beginnings() -> None:
    scheduler = make(num_blocks=8)
    serve(scheduler, request("old", [1] * 9))
    serve(scheduler, request("new", [2] * 9))
    serve(scheduler, request("large", [3] * 19))
    assert serve(scheduler, request("new again", [2] * 9)) == 1
    assert serve(scheduler, request("old again", [1] * 9)) == 5


def test_a_reservation_pins_the_prefix_that_is_there() -> None:
    scheduler = make(num_blocks=6)
    serve(scheduler, request("a", PROMPT))
    reserved = request("b", PROMPT, max_tokens=4)
    assert scheduler.reserve(reserved)
    serve(scheduler, request("large", [3] * 10))  # takes all the rest
    assert reserved.num_cached_tokens == 8
    assert index(scheduler).find(request("c", PROMPT)) == scheduler._pool.table("b")[:2]


def test_what_came_from_elsewhere_is_found_once_it_has_joined() -> None:
    scheduler = make()
    scheduler.reserve(request("a", PROMPT, max_tokens=9))
    assert index(scheduler).find(request("b", PROMPT)) == ()
    scheduler.join("a", 7)
    assert len(index(scheduler).find(request("b", PROMPT))) == 2


def test_a_reservation_needs_no_room_for_what_others_hold_already() -> None:
    scheduler = make(num_blocks=5)
    scheduler.add(request("a", PROMPT, max_tokens=9))
    step(scheduler)
    assert not scheduler.reserve(request("b", [99] * 10))
    assert scheduler.reserve(request("c", PROMPT))
    scheduler.check_integrity()


def test_an_abandoned_step_leaves_nothing_to_be_found() -> None:
    scheduler = make()
    scheduler.add(request("a", PROMPT))
    scheduler.abandon(scheduler.schedule())
    assert index(scheduler).find(request("b", PROMPT)) == ()
    scheduler.check_integrity()


def test_lookups_are_counted_in_tokens_and_once_for_a_request() -> None:
    scheduler = make(num_blocks=4)
    serve(scheduler, request("a", [1] * 7))
    scheduler.add(request("b", [1] * 7, max_tokens=9))
    scheduler.add(request("c", [2] * 6, max_tokens=9))
    for _ in range(20):
        step(scheduler)
    assert scheduler.num_preemptions > 0
    assert (index(scheduler).num_queries, index(scheduler).num_hits) == (7 + 7 + 6, 4)


def test_changes_are_told_once_and_as_a_whole() -> None:
    scheduler = make(num_blocks=3)
    a = request("a", PROMPT)
    serve(scheduler, a)
    assert index(scheduler).take_changes() == CacheChanged(stored=tuple(a.block_hashes))
    assert index(scheduler).take_changes() is None
    b = request("b", [3] * 10)
    serve(scheduler, b)
    assert index(scheduler).take_changes() == CacheChanged(tuple(b.block_hashes), tuple(reversed(a.block_hashes)))
    assert index(scheduler).snapshot() == CacheChanged(tuple(b.block_hashes), cleared=True)


def test_what_came_and_went_between_two_calls_is_not_told() -> None:
    scheduler = make(num_blocks=3)
    serve(scheduler, request("a", PROMPT))
    serve(scheduler, request("b", [3] * 10))
    b = index(scheduler).snapshot().stored
    assert index(scheduler).take_changes() == CacheChanged(stored=b)


def _points_elsewhere(index: PrefixIndex) -> None:
    index._hashes[7] = index._hashes.pop(next(iter(index._hashes)))


def _is_lost(index: PrefixIndex) -> None:
    index._blocks.popitem()


def _may_be_written(index: PrefixIndex) -> None:
    index.insert(request("x", [5] * 4), (6,), 0, 4)


@pytest.mark.parametrize("damage", [_points_elsewhere, _is_lost, _may_be_written])
def test_integrity_check_sees_that_a_prefix(damage: object) -> None:
    scheduler = make()
    serve(scheduler, request("a", PROMPT))
    assert callable(damage)
    damage(index(scheduler))
    with pytest.raises(IntegrityError):
        scheduler.check_integrity()
