"""Requests that have given way, and what they have computed: kept in host memory. Pure bookkeeping, as the pool's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from core.errors import IntegrityError
from core.request import Request
from engine.block_pool import BlockPool
from engine.plan import Swap


class ParkingCounts(NamedTuple):
    """Blocks of host memory that are held; since the start, how often what a request had computed was kept, or lost."""

    num_held_blocks: int
    num_parks: int
    num_recomputes: int


class Parking:
    """Hands out blocks of host memory, each as large as one of the cache, and notes what is to be copied.

    Holds the blocks of a request from `park` until `bring_back` or `drop`. What a plan reads out of host memory may be
    written again by the next plan, not by the same: in each, `park` is called before `bring_back`.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._pool = BlockPool(num_blocks, block_size)
        self._out: list[Swap] = []
        self._in: list[Swap] = []
        self._num_parks = self._num_recomputes = 0

    @property
    def counts(self) -> ParkingCounts:
        num_held_blocks = self._pool.num_blocks - self._pool.num_free_blocks
        return ParkingCounts(num_held_blocks, self._num_parks, self._num_recomputes)

    def park(self, request: Request, table: tuple[int, ...]) -> bool:
        """Keep what the request has computed, in blocks `table`. False where that is nothing, or there is no room."""
        request_id = request.request_id
        if not request.num_computed_tokens or not self._pool.allocate(request_id, request.num_computed_tokens):
            return False
        self._num_parks += 1
        host = self._pool.table(request_id)
        self._out.append(Swap(request_id, table[: len(host)], host))
        return True

    def bring_back(self, request: Request, table: tuple[int, ...], num_computed_tokens: int) -> None:
        """Put what was kept, `num_computed_tokens`, behind what the request has found in the cache again."""
        if request.num_computed_tokens < num_computed_tokens:
            host, first = self._pool.table(request.request_id), request.num_computed_tokens // self._pool.block_size
            self._in.append(Swap(request.request_id, table[first : len(host)], host[first:]))
            request.num_computed_tokens = num_computed_tokens
        self.drop(request.request_id)

    def lose(self, request: Request) -> None:
        """What the request has computed is gone."""
        self.drop(request.request_id)
        self._num_recomputes += request.num_computed_tokens > 0
        request.num_computed_tokens = 0

    def drop(self, request_id: str) -> None:
        """Idempotent."""
        self._pool.free(request_id)

    def take_swaps(self) -> tuple[tuple[Swap, ...], tuple[Swap, ...]]:
        """What leaves and what comes back, since the last call."""
        swaps = tuple(self._out), tuple(self._in)
        self._out, self._in = [], []
        return swaps

    def check_integrity(self, parked: Sequence[Request]) -> None:
        """`IntegrityError` unless each parked request, and nobody else, holds blocks for what it has computed."""
        self._pool.check_integrity([request.request_id for request in parked])
        for request in parked:
            if len(self._pool.table(request.request_id)) != self._pool.num_blocks_for(request.num_computed_tokens):
                raise IntegrityError(f"request {request.request_id} is parked without what it has computed")
