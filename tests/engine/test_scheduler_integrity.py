"""The integrity check of the scheduler sees every kind of damage."""

from collections.abc import Callable

import pytest

from core.errors import IntegrityError
from core.request import Request, RequestState
from core.sampling import SamplingParams
from engine.block_pool import BlockPool
from engine.plan import Drawn, StepResult
from engine.scheduler import Scheduler


def request(request_id: str, num_prompt: int) -> Request:
    return Request(request_id, [1] * num_prompt, SamplingParams(max_tokens=100))


def step(scheduler: Scheduler) -> None:
    plan = scheduler.schedule()
    scheduler.update(
        plan, StepResult({entry.request_id: Drawn((7,)) for entry in plan.entries if entry.sampling is not None})
    )


def _computed_too_far(scheduler: Scheduler, pool: BlockPool) -> None:
    scheduler.requests["running"].num_computed_tokens += 1


def _blocks_lost(scheduler: Scheduler, pool: BlockPool) -> None:
    pool.free("prefilling")


def _blocks_to_spare(scheduler: Scheduler, pool: BlockPool) -> None:
    pool.allocate("running", 40)


def _waiting_with_blocks(scheduler: Scheduler, pool: BlockPool) -> None:
    pool.allocate("waiting", 1)


def _missing_in_queue(scheduler: Scheduler, pool: BlockPool) -> None:
    scheduler._waiting.clear()


def _twice_in_queue(scheduler: Scheduler, pool: BlockPool) -> None:
    scheduler._waiting *= 2


def _reserved_yet_computed(scheduler: Scheduler, pool: BlockPool) -> None:
    scheduler.requests["reserved"].num_computed_tokens = 1


def _prefilled_without_token(scheduler: Scheduler, pool: BlockPool) -> None:
    scheduler.requests["prefilled"].output_token_ids.clear()


def _finished_yet_there(scheduler: Scheduler, pool: BlockPool) -> None:
    scheduler.requests["running"].state = RequestState.FINISHED


def _forgotten(scheduler: Scheduler, pool: BlockPool) -> None:
    del scheduler._requests["reserved"]


def _prefill_only_left_behind(scheduler: Scheduler, pool: BlockPool) -> None:
    scheduler._prefill_only.add("gone")


def _retired_between_steps(scheduler: Scheduler, pool: BlockPool) -> None:
    pool.allocate("gone", 1)
    pool.retire("gone")


def _in_step_though_gone(scheduler: Scheduler, pool: BlockPool) -> None:
    scheduler._in_step["gone"] = request("gone", 1)


def _more_than_allowed(scheduler: Scheduler, pool: BlockPool) -> None:
    scheduler._max_num_seqs = 3


@pytest.mark.parametrize(
    "damage",
    [
        _computed_too_far,
        _blocks_lost,
        _blocks_to_spare,
        _waiting_with_blocks,
        _missing_in_queue,
        _twice_in_queue,
        _reserved_yet_computed,
        _prefilled_without_token,
        _finished_yet_there,
        _forgotten,
        _prefill_only_left_behind,
        _retired_between_steps,
        _in_step_though_gone,
        _more_than_allowed,
    ],
)
def test_integrity_check_sees(damage: Callable[[Scheduler, BlockPool], None]) -> None:
    """Each request is named after what it is."""
    pool = BlockPool(num_blocks=40, block_size=4)
    scheduler = Scheduler(pool, max_num_batched_tokens=8, max_num_seqs=4, max_model_len=160)
    scheduler.add(request("prefilled", 5), prefill_only=True)
    step(scheduler)
    scheduler.reserve(request("reserved", 5))
    scheduler.add(request("running", 5))
    step(scheduler)
    scheduler.add(request("prefilling", 12))
    scheduler.add(request("waiting", 5))
    step(scheduler)
    assert [r.state.value for r in scheduler.requests.values()] == ["held", "held", "running", "running", "waiting"]
    scheduler.check_integrity()
    damage(scheduler, pool)
    with pytest.raises(IntegrityError):
        scheduler.check_integrity()
