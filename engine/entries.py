"""What a step computes for one request."""

from __future__ import annotations

from collections.abc import Sequence

from core.request import Request
from engine.block_pool import BlockPool
from engine.plan import PlanEntry
from engine.speculation.speculator import Speculator


def prefill_entry(request: Request, num_tokens: int, table: tuple[int, ...]) -> PlanEntry:
    """The next `num_tokens` tokens of the request. A token is drawn only where it has no others."""
    start, known, sampling = request.num_computed_tokens, request.num_tokens, request.sampling
    end = start + num_tokens
    return PlanEntry(
        request.request_id,
        tuple(request.token_ids(start, end)),
        start,
        table,
        sampling if end == known else None,
        known - request.num_prompt_tokens,
        history=request.packed_token_ids() if end == known and sampling.looks_back else b"",
        prompt_targets=request.prompt_targets(start, end),
        num_prompt_top=sampling.prompt_logprobs or 0,
    )


def guess(
    speculator: Speculator | None, pool: BlockPool, wanted: Sequence[tuple[Request, int]], budget: int
) -> list[list[int]]:
    """Guesses for requests that decode, for each up to its limit; `budget` in all, and no more than blocks can hold."""
    if speculator is None or not budget:
        return [[]] * len(wanted)
    drafts = speculator.drafts(wanted, budget)
    for (request, _), guesses in zip(wanted, drafts, strict=True):
        if guesses and not pool.allocate(request.request_id, request.num_tokens + len(guesses)):
            del guesses[len(pool.table(request.request_id)) * pool.block_size - request.num_tokens :]
    return drafts


def decode_entry(request: Request, drafts: Sequence[int], table: tuple[int, ...]) -> PlanEntry:
    """The last token of the request, the only one to compute, and guesses of those after it."""
    known, sampling = request.num_tokens, request.sampling
    return PlanEntry(
        request.request_id,
        (request.last_token_id, *drafts),
        known - 1,
        table,
        sampling,
        known - request.num_prompt_tokens,
        len(drafts),
        request.packed_token_ids() if sampling.looks_back else b"",
    )
