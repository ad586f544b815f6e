"""A request that goes on under another name, with the blocks that it has."""

import pytest

from core.request import Request, RequestState
from core.sampling import SamplingParams
from engine.block_pool import BlockPool
from engine.prefix_index import PrefixIndex
from engine.scheduler import Scheduler
from tests.engine.scheduling import ANY, make, request, result, shape, step


def test_a_successor_takes_over_what_was_computed_and_the_blocks() -> None:
    """It knows fewer tokens; the last of these is computed anew, and the next drawn."""
    scheduler, pool = make(num_blocks=8)
    scheduler.add(request("a", 6))
    for _ in range(5):
        step(scheduler)
    table, waiting = pool.table("a"), request("waiting", 23)
    scheduler.add(waiting)
    after = Request("b", [1, 2, 3, 4, 5, 6, ANY, ANY], SamplingParams(max_tokens=100), num_prompt_tokens=6)
    assert scheduler.succeed("a", after)
    scheduler.check_integrity()
    assert list(scheduler.requests) == ["waiting", "b"]
    assert pool.table("b") == table
    plan, outputs = step(scheduler)
    assert shape(plan)[0] == ("b", 7, 8, True)
    assert (outputs[0].request, after.state, after.num_cached_tokens) == (after, RequestState.HELD, 7)
    scheduler.release("b")
    scheduler.release("waiting")
    assert pool.num_free_blocks == pool.num_blocks


@pytest.mark.parametrize("tokens", [[1, 2, 3, 4, 9], [1, 2, 3, 4, 5, 6, ANY, ANY, ANY, ANY]])
def test_one_that_knows_other_tokens_or_more_is_no_successor(tokens: list[int]) -> None:
    scheduler, pool = make()
    scheduler.add(request("a", 6))
    for _ in range(2):
        step(scheduler)
    table = pool.table("a")
    after = Request("b", tokens, SamplingParams(max_tokens=100))
    assert not scheduler.succeed("a", after)
    assert not scheduler.succeed("unknown", after)
    scheduler.check_integrity()
    assert (list(scheduler.requests), pool.table("a")) == (["a"], table)


def test_one_that_is_being_computed_has_no_successor() -> None:
    scheduler, _ = make()
    scheduler.add(request("a", 6))
    step(scheduler)
    plan = scheduler.schedule()
    assert not scheduler.succeed("a", Request("b", [1, 2, 3, 4, 5, 6], SamplingParams(max_tokens=100)))
    scheduler.update(plan, result(plan))


def decoding_with_a_cache(*outputs: int) -> tuple[Scheduler, BlockPool]:
    """One that has drawn these, in blocks of two positions that others may share once they are full."""
    pool = BlockPool(8, 2, PrefixIndex("m", 2))
    scheduler = Scheduler(pool, max_num_batched_tokens=32, max_num_seqs=8, max_model_len=16)
    scheduler.add(request("a", 3))
    for token_id in outputs:
        step(scheduler, token_id)
    return scheduler, pool


def test_what_a_successor_computes_again_is_found_by_nobody_meanwhile() -> None:
    """A block that is found is not written, not even with what it holds already."""
    scheduler, pool = decoding_with_a_cache(7, 7, 7)
    assert scheduler.succeed("a", Request("b", [1, 2, 3, 7], SamplingParams(max_tokens=9), num_prompt_tokens=3))
    other = Request("c", [1, 2, 3, 7, 9], SamplingParams(max_tokens=9))
    assert len(pool.find(other)) == 1
    scheduler.add(other)
    plan, _ = step(scheduler, 7)
    first = {entry.request_id: entry for entry in plan.entries}
    assert not set(first["b"].block_ids[first["b"].start // 2 :]) & set(first["c"].block_ids)


def test_a_block_that_somebody_shares_is_not_handed_on_to_be_computed_again() -> None:
    scheduler, pool = decoding_with_a_cache(7, 7, 7)
    scheduler.add(Request("c", [1, 2, 3, 7, 9], SamplingParams(max_tokens=9)))
    step(scheduler, 7)
    assert len(set(pool.table("a")) & set(pool.table("c"))) == 2
    before = pool.table("a")
    after = Request("b", [1, 2, 3, 7], SamplingParams(max_tokens=9), num_prompt_tokens=3)
    assert not scheduler.succeed("a", after)
    scheduler.check_integrity()
    assert (list(scheduler.requests), pool.table("a")) == (["a", "c"], before)
