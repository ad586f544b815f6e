"""Who holds which blocks of the KV cache. Pure bookkeeping: the memory itself is in `engine/kv_storage.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from core.errors import IntegrityError


class BlockPool:
    """Hands out the blocks 0 .. num_blocks - 1, each to one request at a time, the same ones for the same calls.

    A block is free, held by a request, or retired: given up by a request while a step may still write into it. Retired
    blocks become free with `reclaim`. free + held + retired = num_blocks, always.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(reversed(range(num_blocks)))
        self._retired: list[int] = []
        self._tables: dict[str, tuple[int, ...]] = {}

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    @property
    def num_retired_blocks(self) -> int:
        return len(self._retired)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def table(self, request_id: str) -> tuple[int, ...]:
        """Blocks of the request in the order of its positions; empty where it holds none."""
        return self._tables.get(request_id, ())

    def allocate(self, request_id: str, num_tokens: int) -> bool:
        """Grow the request's table to cover `num_tokens` positions. False, and no change, where blocks run out."""
        table = self.table(request_id)
        num_new = self.num_blocks_for(num_tokens) - len(table)
        if num_new <= 0:
            return True
        if num_new > len(self._free):
            return False
        self._tables[request_id] = table + tuple(self._free.pop() for _ in range(num_new))
        return True

    def free(self, request_id: str) -> int:
        """Take back all blocks of the request; returns how many. Nobody may write into them any more."""
        table = self._tables.pop(request_id, ())
        self._free.extend(reversed(table))
        return len(table)

    def retire(self, request_id: str) -> int:
        """As `free`, but while a step may still write into the blocks: they are handed out only after `reclaim`."""
        table = self._tables.pop(request_id, ())
        self._retired.extend(reversed(table))
        return len(table)

    def reclaim(self) -> int:
        """The step is over: retired blocks become free. Returns how many."""
        num_blocks = len(self._retired)
        self._free += self._retired
        self._retired.clear()
        return num_blocks

    def check_integrity(self, live_request_ids: Collection[str]) -> None:
        """`IntegrityError` where a block is lost, is in two places, or is held for a request that is not live."""
        for request_id, table in self._tables.items():
            if request_id not in live_request_ids:
                raise IntegrityError(f"{len(table)} blocks are held for {request_id}, which is gone")
        held = [block for table in self._tables.values() for block in table]
        places = Counter(self._free + self._retired + held)
        for block, count in places.items():
            if count > 1 or not 0 <= block < self.num_blocks:
                raise IntegrityError(f"block {block} is in {count} places of a pool of {self.num_blocks}")
        if len(places) != self.num_blocks:
            raise IntegrityError(f"{self.num_blocks - len(places)} of {self.num_blocks} blocks are lost")
