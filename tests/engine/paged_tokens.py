"""A model that reads all it knows from a paged memory that plans write into.

Its next token is a hash of what stands in the blocks of a plan's entry. A block that is shared by mistake, or found
where it should not be, shows as a wrong token.
"""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

from core.request import Request
from engine.plan import Drawn, Plan, PlanEntry, StepResult

STOP = 0
VOCAB_SIZE = 64


def next_token(token_ids: list[int]) -> int:
    return crc32(bytes(token_ids)) % VOCAB_SIZE


def undisturbed_output(request: Request, max_model_len: int) -> list[int]:
    """What the request draws when it is alone in the world."""
    alone = Request(request.request_id, list(request.prompt_token_ids), request.sampling)
    while alone.append(next_token(alone.token_ids(0, alone.num_tokens)), max_model_len) is None:
        pass
    return alone.output_token_ids


class PagedMemory:
    """Tokens in blocks, where an engine has K and V."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._tokens: dict[tuple[int, int], int] = {}

    def write(self, block_ids: tuple[int, ...], start: int, token_ids: list[int]) -> None:
        for position, token_id in enumerate(token_ids, start):
            self._tokens[block_ids[position // self._block_size], position % self._block_size] = token_id

    def read(self, block_ids: tuple[int, ...], end: int) -> list[int]:
        return [self._tokens[block_ids[p // self._block_size], p % self._block_size] for p in range(end)]

    def block(self, block: int) -> dict[int, int]:
        offsets = range(self._block_size)
        return {offset: self._tokens[block, offset] for offset in offsets if (block, offset) in self._tokens}

    def write_block(self, block: int, tokens: dict[int, int]) -> None:
        for offset in range(self._block_size):
            self._tokens.pop((block, offset), None)
        self._tokens.update({(block, offset): token for offset, token in tokens.items()})


def compute(plan: Plan, memory: PagedMemory, host: dict[int, dict[int, int]]) -> StepResult:
    """`host` is host memory: what stands in its blocks."""
    for swap in plan.swaps_out:
        for block, host_block in zip(swap.block_ids, swap.host_block_ids, strict=True):
            host[host_block] = memory.block(block)
    for swap in plan.swaps_in:
        for block, host_block in zip(swap.block_ids, swap.host_block_ids, strict=True):
            memory.write_block(block, host[host_block])
    for entry in plan.entries:
        memory.write(entry.block_ids, entry.start, list(entry.token_ids))
    return StepResult({e.request_id: draw(e, memory) for e in plan.entries if e.sampling is not None})


def draw(entry: PlanEntry, memory: PagedMemory) -> Drawn:
    """Each row on its own, and then as many as are right."""
    first = entry.end - entry.num_drafts
    drawn = [next_token(memory.read(entry.block_ids, end)) for end in range(first, entry.end + 1)]
    drafts = entry.token_ids[first - entry.start :]
    num_right = next((i for i, draft in enumerate(drafts) if draft != drawn[i]), len(drafts))
    return Drawn(tuple(drawn[: num_right + 1]), in_vain=tuple(drawn[num_right + 1 :]))


class Guesser:
    """Guesses that are right for a while, and then mostly wrong."""

    seconds_per_token = 0.0

    def __init__(self) -> None:
        self.known: set[Request] = set()

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> list[list[int]]:
        self.known.update(request for request, _ in wanted)
        return [self.guess(request.token_ids(0, request.num_tokens), limit) for request, limit in wanted]

    def guess(self, token_ids: list[int], limit: int) -> list[int]:
        known, num_right = len(token_ids), crc32(bytes(token_ids[::-1])) % 4
        while len(token_ids) < known + limit:
            wrong = len(token_ids) - known >= num_right
            token_ids.append((next_token(token_ids) + wrong) % VOCAB_SIZE)
        return token_ids[known:]

    def learn(self, request: Request, token_ids: Sequence[int], drawn: Sequence[int]) -> None:
        assert list(token_ids) == (request.token_ids(0, request.num_tokens) + list(token_ids[1:]))[-len(token_ids) :]
        assert len(token_ids) == len(drawn)

    def forget(self, request: Request) -> None:
        self.known.discard(request)
