"""What a request may hold of the KV cache, given its state and how far it has come."""

from __future__ import annotations

from core.errors import IntegrityError
from core.request import Request, RequestState
from engine.block_pool import BlockPool


def check_blocks(
    request: Request, table: tuple[int, ...], pool: BlockPool, prefill_only: bool, max_drafts: int
) -> None:
    """`IntegrityError` where that is not a table that the request may hold between two calls of the scheduler."""
    allowed = _allowed(request, pool, prefill_only, max_drafts)
    if pool.table(request.request_id) is not table or len(table) not in allowed:
        raise IntegrityError(
            f"request {request.request_id}, {request.state.name}: {len(table)} blocks for "
            f"{request.num_computed_tokens} computed of {request.num_tokens} tokens"
        )


def _allowed(request: Request, pool: BlockPool, prefill_only: bool, max_drafts: int) -> range:
    """None where the request contradicts itself."""
    blocks_for = pool.num_blocks_for
    computed, known, num_prompt = request.num_computed_tokens, request.num_tokens, len(request.prompt_token_ids)
    match request.state:
        case RequestState.WAITING if computed == 0:
            return range(1)
        case RequestState.PARKED if 0 < computed < known:
            return range(1)
        case RequestState.RUNNING if 0 <= computed < known - 1:
            return _only(blocks_for(known + 1))
        case RequestState.RUNNING if computed == known - 1:
            return range(blocks_for(computed), blocks_for(known + 1 + max_drafts) + 1)
        case RequestState.HELD if prefill_only and computed == num_prompt == known - 1:
            return _only(blocks_for(known))
        case RequestState.HELD if not prefill_only and computed == request.num_cached_tokens and known == num_prompt:
            return _only(blocks_for(known + 1))
        case _:
            return range(0)


def _only(num_blocks: int) -> range:
    return range(num_blocks, num_blocks + 1)


def goes_on_with(request: Request, successor: Request) -> bool:
    """Whether the request decodes, and has computed all that its successor knows but the last token."""
    num_tokens = successor.num_tokens
    return (
        request.state is RequestState.RUNNING
        and request.num_computed_tokens >= num_tokens - 1
        and request.token_ids(0, num_tokens) == successor.token_ids(0, num_tokens)
    )
