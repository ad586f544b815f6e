"""What a request may hold, given its state and how far it has come."""

from __future__ import annotations

from collections.abc import Callable

from core.request import Request, RequestState


def allowed_blocks(request: Request, blocks_for: Callable[[int], int], *, prefill_only: bool, max_drafts: int) -> range:
    """Numbers of blocks that the request may hold between two calls of the scheduler; none where it contradicts itself.

    `blocks_for` says how many blocks hold so many tokens.
    """
    computed, known, num_prompt = request.num_computed_tokens, request.num_tokens, len(request.prompt_token_ids)
    match request.state:
        case RequestState.WAITING if computed == 0:
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
