"""The scheduler, one rule at a time. What holds for all of them together is in test_scheduler_properties.py."""

from collections.abc import Callable

import pytest

from core.errors import ConfigError, IntegrityError, InvalidRequestError
from core.request import FinishReason, Request, RequestState
from core.sampling import SamplingParams
from engine.block_pool import BlockPool
from engine.plan import StepOutput
from engine.scheduler import Scheduler
from tests.engine.scheduling import ANY, STOP, make, request, result, shape, step


def test_a_prompt_within_the_budget_is_prefilled_and_sampled_in_one_step() -> None:
    scheduler, pool = make()
    a = request("a", 5)
    scheduler.add(a)
    plan, outputs = step(scheduler)
    assert shape(plan) == [("a", 0, 5, True)]
    assert plan.entries[0].token_ids == (1, 2, 3, 4, 5)
    assert plan.entries[0].block_ids == pool.table("a")
    assert outputs == [StepOutput(a, (ANY,), None)]


def test_a_long_prompt_is_cut_into_chunks_and_only_the_last_draws_a_token() -> None:
    scheduler, _ = make(max_num_batched_tokens=4)
    scheduler.add(request("a", 10))
    steps = [step(scheduler) for _ in range(4)]
    assert [shape(plan) for plan, _ in steps] == [
        [("a", 0, 4, False)],
        [("a", 4, 8, False)],
        [("a", 8, 10, True)],
        [("a", 10, 11, True)],
    ]
    assert [len(outputs) for _, outputs in steps] == [0, 0, 1, 1]


def test_decoding_comes_before_prefill_whoever_is_older() -> None:
    scheduler, _ = make(max_num_batched_tokens=4)
    scheduler.add(request("long", 10))
    step(scheduler)
    scheduler.reserve(request("b", 2))
    scheduler.join("b", ANY)
    plan, _ = step(scheduler)
    assert shape(plan) == [("b", 2, 3, True), ("long", 4, 7, False)]


def test_prefills_share_what_the_budget_leaves_in_the_order_of_arrival() -> None:
    scheduler, _ = make(max_num_batched_tokens=8)
    for request_id in "abc":
        scheduler.add(request(request_id, 5))
    plan, _ = step(scheduler)
    assert shape(plan) == [("a", 0, 5, True), ("b", 0, 3, False)]
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_waiting_tokens) == (2, 1, 2 + 5)


def test_what_the_sampler_must_know_of_earlier_outputs_counts_those_before_a_resume() -> None:
    scheduler, _ = make()
    resumed = Request("a", [1, 2, 3, 4, 5], SamplingParams(max_tokens=10, min_tokens=4), num_prompt_tokens=3)
    scheduler.add(resumed)
    plans = [step(scheduler)[0] for _ in range(2)]
    assert [plan.entries[0].num_output_tokens for plan in plans] == [2, 3]


def test_admission_waits_for_blocks_of_the_whole_prompt_and_one_token() -> None:
    scheduler, _ = make(num_blocks=4, block_size=4)
    scheduler.add(request("a", 7))
    scheduler.add(request("b", 8))  # needs 3 blocks: 2 are free
    plan, _ = step(scheduler)
    assert shape(plan) == [("a", 0, 7, True)]
    scheduler.release("a")
    plan, _ = step(scheduler)
    assert shape(plan) == [("b", 0, 8, True)]


def test_nobody_overtakes_the_head_of_the_queue() -> None:
    scheduler, _ = make(num_blocks=4, block_size=4)
    for request_id, num_prompt in [("a", 7), ("large", 12), ("small", 1)]:
        scheduler.add(request(request_id, num_prompt))
    step(scheduler)
    assert scheduler.requests["small"].state is RequestState.WAITING


def test_sequences_are_admitted_up_to_the_limit_and_held_ones_count() -> None:
    scheduler, _ = make(max_num_seqs=3)
    assert scheduler.reserve(request("held", 1))
    for request_id in "abc":
        scheduler.add(request(request_id, 1))
    plan, _ = step(scheduler)
    assert [entry.request_id for entry in plan.entries] == ["a", "b"]


@pytest.mark.parametrize(
    ("max_tokens", "token_id", "reason"),
    [(1, ANY, FinishReason.LENGTH), (9, STOP, FinishReason.STOP)],
)
def test_a_finished_request_is_gone_with_its_blocks(max_tokens: int, token_id: int, reason: FinishReason) -> None:
    scheduler, pool = make()
    a = request("a", 5, max_tokens)
    scheduler.add(a)
    _, outputs = step(scheduler, token_id)
    assert outputs == [StepOutput(a, (token_id,), reason)]
    assert a.state is RequestState.FINISHED
    assert not scheduler.requests
    assert pool.num_free_blocks == pool.num_blocks


def test_a_request_ends_at_the_length_of_the_model() -> None:
    scheduler, _ = make(num_blocks=2, block_size=4)
    a = request("a", 5)
    scheduler.add(a)
    reasons = [step(scheduler)[1][0].finish_reason for _ in range(3)]
    assert reasons == [None, None, FinishReason.LENGTH]
    assert a.num_tokens == 8


def test_a_prefill_only_request_keeps_its_blocks_until_it_is_released() -> None:
    scheduler, pool = make()
    a = request("a", 5)
    scheduler.add(a, prefill_only=True)
    step(scheduler)
    assert (a.state, scheduler.num_held, len(pool.table("a"))) == (RequestState.HELD, 1, 2)
    assert not scheduler.schedule()
    assert scheduler.release("a")
    assert pool.num_free_blocks == pool.num_blocks


def test_a_prefill_only_request_that_its_first_token_ends_holds_nothing() -> None:
    scheduler, pool = make()
    scheduler.add(request("a", 5), prefill_only=True)
    step(scheduler, STOP)
    assert not scheduler.requests
    assert pool.num_free_blocks == pool.num_blocks


def test_a_reserved_request_decodes_from_its_first_token_once_it_has_joined() -> None:
    scheduler, pool = make()
    a = request("a", 8)
    assert scheduler.reserve(a)
    assert (a.state, len(pool.table("a"))) == (RequestState.HELD, 3)
    assert not scheduler.schedule()
    assert scheduler.join("a", 9) == StepOutput(a, (9,), None)
    plan, _ = step(scheduler)
    assert shape(plan) == [("a", 8, 9, True)]
    assert plan.entries[0].token_ids == (9,)


def test_a_first_token_that_ends_the_request_frees_it_at_the_join() -> None:
    scheduler, pool = make()
    scheduler.reserve(request("a", 8))
    assert scheduler.join("a", STOP).finish_reason is FinishReason.STOP
    assert pool.num_free_blocks == pool.num_blocks


@pytest.mark.parametrize("limits", [{"num_blocks": 3}, {"max_num_seqs": 1}])
def test_a_reservation_without_room_holds_nothing(limits: dict[str, int]) -> None:
    scheduler, pool = make(**limits)
    scheduler.reserve(request("a", 4))
    free = pool.num_free_blocks
    b = request("b", 4)
    assert not scheduler.reserve(b)
    assert (b.state, pool.num_free_blocks, list(scheduler.requests)) == (RequestState.WAITING, free, ["a"])


@pytest.mark.parametrize("limits", [{"num_blocks": 3}, {"max_num_seqs": 1}])
def test_a_reservation_takes_no_room_from_those_who_wait(limits: dict[str, int]) -> None:
    scheduler, _ = make(**limits)
    scheduler.add(request("a", 4))
    assert not scheduler.reserve(request("b", 4))


def test_only_a_reserved_request_can_join() -> None:
    scheduler, _ = make()
    scheduler.add(request("prefilled", 4), prefill_only=True)
    step(scheduler)
    scheduler.add(request("waiting", 4))
    for request_id in ("prefilled", "waiting", "unknown"):
        with pytest.raises(IntegrityError, match="not reserved"):
            scheduler.join(request_id, ANY)


def full_of_decoding(*request_ids: str) -> tuple[Scheduler, BlockPool]:
    """Each request fills two blocks of four, and needs a third in the step after the next."""
    scheduler, pool = make(num_blocks=2 * len(request_ids), block_size=4)
    for request_id in request_ids:
        scheduler.add(request(request_id, 6))
    step(scheduler)
    step(scheduler)
    return scheduler, pool


def test_the_youngest_decoding_request_gives_way() -> None:
    scheduler, pool = full_of_decoding("a", "b", "c")
    step(scheduler)
    plan, _ = step(scheduler)
    assert plan.preempted == ("c",)
    assert [entry.request_id for entry in plan.entries] == ["a", "b"]
    assert (scheduler.num_preemptions, scheduler.num_waiting, pool.table("c")) == (1, 1, ())


def test_a_preempted_request_computes_prompt_and_outputs_anew_and_then_goes_on() -> None:
    scheduler, _ = full_of_decoding("a", "b")
    step(scheduler)
    step(scheduler)
    scheduler.add(request("late", 1))
    scheduler.release("a")
    plan, _ = step(scheduler, 9)
    assert shape(plan) == [("b", 0, 9, True), ("late", 0, 1, True)]
    assert plan.entries[0].token_ids == (1, 2, 3, 4, 5, 6, ANY, ANY, ANY)
    assert plan.entries[0].num_output_tokens == 3
    assert scheduler.requests["b"].output_token_ids == [ANY, ANY, ANY, 9]


def test_requests_preempted_in_one_step_wait_in_the_order_of_their_arrival() -> None:
    scheduler, _ = full_of_decoding("a", "b", "c", "d")
    scheduler.add(request("late", 1))
    step(scheduler)
    plan, _ = step(scheduler)
    assert plan.preempted == ("d", "c")
    assert [r.request_id for r in scheduler._waiting] == ["c", "d", "late"]


def test_a_prefill_only_request_never_gives_way() -> None:
    scheduler, _ = make(num_blocks=4, block_size=4, max_num_batched_tokens=2)
    scheduler.reserve(request("a", 7))
    scheduler.join("a", ANY)
    scheduler.add(request("kept", 7), prefill_only=True)
    plan, _ = step(scheduler)
    assert shape(plan) == [("a", 7, 8, True), ("kept", 0, 1, False)]
    plan, _ = step(scheduler)
    assert (shape(plan), plan.preempted) == ([("kept", 1, 3, False)], ("a",))


def test_a_prefill_that_gives_way_is_not_in_the_plan_it_gives_way_to() -> None:
    scheduler, pool = make(num_blocks=4, block_size=4, max_num_batched_tokens=2)
    scheduler.reserve(request("a", 7))
    scheduler.join("a", ANY)
    scheduler.add(request("young", 7))
    step(scheduler)
    plan, _ = step(scheduler)
    assert (shape(plan), plan.preempted) == ([("a", 8, 9, True)], ("young",))
    assert pool.table("young") == ()


@pytest.mark.parametrize("state", [state for state in RequestState if state is not RequestState.PARKED])
def test_release_is_legal_in_every_state_and_idempotent(state: RequestState) -> None:
    scheduler, pool = make()
    a = request("a", 4, max_tokens=1 if state is RequestState.FINISHED else 9)
    if state is RequestState.HELD:
        scheduler.reserve(a)
    else:
        scheduler.add(a)
    if state in (RequestState.RUNNING, RequestState.FINISHED):
        step(scheduler)
    assert a.state is state
    assert scheduler.release("a") == (state is not RequestState.FINISHED)
    assert not scheduler.release("a")
    scheduler.check_integrity()
    assert pool.num_free_blocks == pool.num_blocks


def test_blocks_that_a_step_still_writes_into_are_free_only_when_it_ends() -> None:
    scheduler, pool = make(num_blocks=2)
    scheduler.add(request("a", 4))
    plan = scheduler.schedule()
    scheduler.release("a")
    scheduler.check_integrity()
    assert not scheduler.reserve(request("b", 4))
    assert scheduler.update(plan, result(plan)) == []
    scheduler.check_integrity()
    assert pool.num_free_blocks == pool.num_blocks
    assert scheduler.reserve(request("b", 4))


def test_the_result_of_a_released_request_does_not_reach_its_successor_of_the_same_name() -> None:
    scheduler, _ = make()
    scheduler.add(request("a", 4))
    plan = scheduler.schedule()
    scheduler.release("a")
    successor = request("a", 4)
    scheduler.add(successor)
    assert scheduler.update(plan, result(plan)) == []
    scheduler.check_integrity()
    assert (successor.state, successor.num_computed_tokens) == (RequestState.WAITING, 0)


def test_an_abandoned_step_releases_its_requests_and_no_others() -> None:
    scheduler, pool = make(max_num_seqs=2)
    a, b, c = (request(request_id, 4) for request_id in "abc")
    for r in (a, b, c):
        scheduler.add(r)
    plan = scheduler.schedule()
    scheduler.release("b")
    assert scheduler.abandon(plan) == [a]
    scheduler.check_integrity()
    assert list(scheduler.requests) == ["c"]
    assert pool.num_free_blocks == pool.num_blocks


def test_a_second_step_can_not_begin_before_the_first_has_ended() -> None:
    scheduler, _ = make()
    scheduler.add(request("a", 4))
    plan = scheduler.schedule()
    with pytest.raises(IntegrityError, match="neither updated nor abandoned"):
        scheduler.schedule()
    scheduler.update(plan, result(plan))
    with pytest.raises(IntegrityError, match="not that of the step in progress"):
        scheduler.update(plan, result(plan))


@pytest.mark.parametrize("num_prompt", [0, 64, 65])
@pytest.mark.parametrize("method", [Scheduler.add, Scheduler.reserve])
def test_a_prompt_without_room_for_one_more_token_is_refused(
    num_prompt: int, method: Callable[[Scheduler, Request], object]
) -> None:
    scheduler, _ = make(num_blocks=16, block_size=4)
    with pytest.raises(InvalidRequestError, match="must be 1 to 63 tokens"):
        method(scheduler, request("a", num_prompt))
    assert not scheduler.requests


def test_a_request_can_not_be_added_twice() -> None:
    scheduler, _ = make()
    scheduler.add(request("a", 1))
    with pytest.raises(IntegrityError, match="there already"):
        scheduler.reserve(request("a", 1))


def test_a_model_length_that_the_pool_could_never_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_model_len: got 9"):
        Scheduler(BlockPool(2, 4), max_num_batched_tokens=8, max_num_seqs=1, max_model_len=9)
