"""Small schedulers, requests for them, and steps in which every token is the same."""

from core.request import Request
from core.sampling import SamplingParams
from engine.block_pool import BlockPool
from engine.plan import Drawn, Plan, StepOutput, StepResult
from engine.scheduler import Scheduler

STOP = 0
ANY = 7


def make(
    num_blocks: int = 16, block_size: int = 4, max_num_batched_tokens: int = 32, max_num_seqs: int = 8
) -> tuple[Scheduler, BlockPool]:
    pool = BlockPool(num_blocks, block_size)
    return Scheduler(
        pool,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        max_model_len=num_blocks * block_size,
    ), pool


def request(request_id: str, num_prompt: int, max_tokens: int = 100) -> Request:
    return Request(
        request_id, list(range(1, num_prompt + 1)), SamplingParams(max_tokens=max_tokens, stop_token_ids=(STOP,))
    )


def result(plan: Plan, token_id: int = ANY) -> StepResult:
    return StepResult({entry.request_id: Drawn((token_id,)) for entry in plan.entries if entry.sampling is not None})


def step(scheduler: Scheduler, token_id: int = ANY) -> tuple[Plan, list[StepOutput]]:
    plan = scheduler.schedule()
    outputs = scheduler.update(plan, result(plan, token_id))
    scheduler.check_integrity()
    return plan, outputs


def shape(plan: Plan) -> list[tuple[str, int, int, bool]]:
    """(request, start, end, whether a token is drawn) of each entry."""
    return [(e.request_id, e.start, e.end, e.sampling is not None) for e in plan.entries]
