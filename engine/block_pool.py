"""Who holds which blocks of the KV cache. Pure bookkeeping: the memory itself is in `engine/kv_storage.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from core.errors import IntegrityError
from core.request import Request
from engine.prefix_index import PrefixIndex


class BlockPool:
    """Hands out the blocks 0 .. num_blocks - 1, the same ones for the same calls.

    | a block is | that means                                                                              |
    |------------|-----------------------------------------------------------------------------------------|
    | empty      | nobody wants what it holds                                                              |
    | held       | by one request, which may write it; by any number where the index knows what it holds   |
    | cached     | no request holds it, the index knows what it holds; handed out anew when none is empty  |
    | retired    | given up by a request while a step may still write it; empty after `reclaim`            |

    empty + held + cached + retired = num_blocks, always. Cached blocks go in the order in which they were given up,
    the end of a request before its beginning.
    """

    def __init__(self, num_blocks: int, block_size: int, index: PrefixIndex | None = None) -> None:
        """Without an index nothing is ever shared or cached."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.index = index
        self._empty = list(reversed(range(num_blocks)))
        self._cached: dict[int, None] = {}  # who goes first comes first
        self._retired: list[int] = []
        self._tables: dict[str, tuple[int, ...]] = {}
        self._num_holders = [0] * num_blocks

    @property
    def num_free_blocks(self) -> int:
        """That no request holds, empty or cached: as many can be allocated."""
        return len(self._empty) + len(self._cached)

    @property
    def num_cached_blocks(self) -> int:
        return len(self._cached)

    @property
    def num_retired_blocks(self) -> int:
        return len(self._retired)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def table(self, request_id: str) -> tuple[int, ...]:
        """Blocks of the request in the order of its positions; empty where it holds none."""
        return self._tables.get(request_id, ())

    def allocate(self, request_id: str, num_tokens: int, prefix: tuple[int, ...] = (), num_spared: int = 0) -> bool:
        """Grow the request's table to cover `num_tokens` positions.

        A new table begins with the blocks `prefix`, which the index has found. False, and no change, where fewer than
        `num_spared` blocks would be left.
        """
        table = self._tables.get(request_id, ())
        num_new = self.num_blocks_for(num_tokens) - len(table)
        if num_new <= 0:
            return True
        num_shared = sum(self._num_holders[block] > 0 for block in prefix)
        if num_new - num_shared + num_spared > self.num_free_blocks:
            return False
        for block in prefix:
            self._num_holders[block] += 1
            self._cached.pop(block, None)
        new = [self._take() for _ in range(num_new - len(prefix))]
        self._tables[request_id] = (*table, *prefix, *new)
        return True

    def find(self, request: Request) -> tuple[int, ...]:
        """Blocks that hold a prefix of the request; none where log-probabilities of its prompt are to be computed."""
        if self.index is None or request.sampling.prompt_logprobs is not None:
            return ()
        return self.index.find(request)

    def admit(self, request: Request, num_spared: int = 0) -> bool:
        """Give the request blocks for all its tokens and one more, first those that hold a prefix of it already.

        False, and no change, where fewer than `num_spared` would be left. Sets `num_computed_tokens`, and the first
        time `num_cached_tokens`.
        """
        prefix = self.find(request)
        if not self.allocate(request.request_id, request.num_tokens + 1, prefix, num_spared):
            return False
        request.num_computed_tokens = len(prefix) * self.block_size
        if request.num_cached_tokens is None:
            request.num_cached_tokens = request.num_computed_tokens
            if self.index is not None and request.sampling.prompt_logprobs is None:
                self.index.count(request.num_tokens, request.num_cached_tokens)
        return True

    def computed(self, request: Request, end: int) -> None:
        """K and V of the request's positions before `end` stand in its blocks: those that are full can be found."""
        start, request.num_computed_tokens = request.num_computed_tokens, end
        if self.index is not None and start // self.block_size != end // self.block_size:
            self.index.insert(request, self._tables[request.request_id], start, end)

    def refilled(self, request: Request) -> None:
        """What the request has computed was copied into its blocks: those that are full can be found."""
        if self.index is not None:
            self.index.insert(request, self._tables[request.request_id], 0, request.num_computed_tokens)

    def hand_on(self, request_id: str, successor: str, num_tokens: int) -> bool:
        """The successor, which holds none, gets the request's blocks for `num_tokens` positions; others become free.

        The last two of these positions are still to be computed, again perhaps: what their blocks held is not found any
        more. False, and no change, where there are too few blocks, or somebody else holds one that would be written.
        """
        num_blocks, first = self.num_blocks_for(num_tokens), max(0, num_tokens - 2) // self.block_size
        written = self._tables[request_id][first:num_blocks]
        if any(self._num_holders[block] > 1 for block in written) or not self.allocate(request_id, num_tokens):
            return False
        for block in written:
            if self.index is not None and block in self.index:
                self.index.remove(block)
        table = self._tables[request_id]
        self._tables[successor], self._tables[request_id] = table[:num_blocks], table[num_blocks:]
        self.free(request_id)
        return True

    def free(self, request_id: str) -> int:
        """Take back all blocks of the request; returns how many. It may not write into them any more."""
        return self._give_up(request_id, self._empty)

    def retire(self, request_id: str) -> int:
        """As `free`, but while a step may still write into the blocks: they are handed out only after `reclaim`."""
        return self._give_up(request_id, self._retired)

    def reclaim(self) -> int:
        """The step is over: retired blocks become empty. Returns how many."""
        num_blocks = len(self._retired)
        self._empty += self._retired
        self._retired.clear()
        return num_blocks

    def flush(self) -> int:
        """Forget what cached blocks hold: they become empty. Returns how many. What requests hold stays known."""
        num_blocks = len(self._cached)
        for block in self._cached:
            assert self.index is not None, "blocks are cached without an index"
            self.index.remove(block)
        self._empty += self._cached
        self._cached.clear()
        return num_blocks

    def check_integrity(self, live_request_ids: Collection[str]) -> None:
        """`IntegrityError` where a block is lost, is in two places, or is held for a request that is not live."""
        for request_id, table in self._tables.items():
            if request_id not in live_request_ids:
                raise IntegrityError(f"{len(table)} blocks are held for {request_id}, which is gone")
        holders = Counter(block for table in self._tables.values() for block in table)
        places = Counter([*self._empty, *self._cached, *self._retired, *holders])
        for block, count in places.items():
            if count > 1 or not 0 <= block < self.num_blocks:
                raise IntegrityError(f"block {block} is in {count} places of a pool of {self.num_blocks}")
        if len(places) != self.num_blocks:
            raise IntegrityError(f"{self.num_blocks - len(places)} of {self.num_blocks} blocks are lost")
        for block, count in enumerate(self._num_holders):
            if holders[block] != count or (count > 1 and not self._is_known(block)):
                raise IntegrityError(f"block {block} is in {holders[block]} tables and counts {count} holders")
        if unknown := [block for block in self._cached if not self._is_known(block)]:
            raise IntegrityError(f"blocks {unknown} are cached, though nobody knows what they hold")
        if self.index is not None:
            self.index.check_integrity(holders.keys() | self._cached.keys())

    def _is_known(self, block: int) -> bool:
        return self.index is not None and block in self.index

    def _take(self) -> int:
        """An empty block, else the one cached longest. There must be one."""
        if self._empty:
            block = self._empty.pop()
        else:
            block = next(iter(self._cached))
            del self._cached[block]
            assert self.index is not None, "blocks are cached without an index"
            self.index.remove(block)
        self._num_holders[block] = 1
        return block

    def _give_up(self, request_id: str, written: list[int]) -> int:
        """The request holds nothing any more. What nobody can find goes to `written`."""
        table = self._tables.pop(request_id, ())
        for block in reversed(table):
            self._num_holders[block] -= 1
            if self._num_holders[block]:
                continue
            if self._is_known(block):
                self._cached[block] = None
            else:
                written.append(block)
        return len(table)
