"""A request that goes on under another name, with the blocks that it has."""

import pytest

from core.request import Request, RequestState
from core.sampling import SamplingParams
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
