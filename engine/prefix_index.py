"""Which blocks hold which prefixes. Pure bookkeeping, as the `BlockPool` that it belongs to."""

from __future__ import annotations

from collections.abc import Collection

from core.block_hash import block_hash, root_hash
from core.errors import IntegrityError
from core.messages import CacheChanged
from core.request import Request


class PrefixIndex:
    """Finds blocks by the tokens whose K and V they hold, all tokens before them included.

    A block gets in when it is full and computed, and nobody writes it from then on: so any number of requests may hold
    it at once. It leaves when the pool hands it out anew. Of two blocks that hold the same, the first is known.
    """

    def __init__(self, model: str, block_size: int) -> None:
        """`model` says all that K and V depend on beside the tokens: see `root_hash`."""
        self._model, self._block_size = model, block_size
        self._blocks: dict[bytes, int] = {}  # by the hash of what they hold
        self._hashes: dict[int, bytes] = {}
        self._stored: dict[bytes, None] = {}  # since `take_changes`, in order
        self._removed: dict[bytes, None] = {}
        self._num_queries = 0
        self._num_hits = 0

    def __contains__(self, block: int) -> bool:
        return block in self._hashes

    @property
    def num_queries(self) -> int:
        """Prompt tokens that were looked up, since the start."""
        return self._num_queries

    @property
    def num_hits(self) -> int:
        """Those of them that were found, and so need not be computed or sent."""
        return self._num_hits

    def find(self, request: Request) -> tuple[int, ...]:
        """Blocks that hold the longest known prefix of the request.

        The last token is never among them: something must be computed to draw from. Where it would fill a block that
        is known, that block is computed again, into one of the request's own: what is shared is not written.
        """
        found = []
        for i in range((request.num_tokens - 1) // self._block_size):
            if (block := self._blocks.get(self._hash(request, i))) is None:
                break
            found.append(block)
        return tuple(found)

    def count(self, num_queries: int, num_hits: int) -> None:
        """A request has got its blocks for the first time, `num_hits` of its `num_queries` tokens from here."""
        self._num_queries += num_queries
        self._num_hits += num_hits

    def insert(self, request: Request, table: tuple[int, ...], start: int, end: int) -> None:
        """Positions [start, end) of the request are computed: from now on the blocks that they fill are found."""
        for i in range(start // self._block_size, end // self._block_size):
            digest = self._hash(request, i)
            if digest not in self._blocks:
                self._blocks[digest] = table[i]
                self._hashes[table[i]] = digest
                _note(digest, self._stored, self._removed)

    def remove(self, block: int) -> None:
        """The block will hold something else."""
        digest = self._hashes.pop(block)
        del self._blocks[digest]
        _note(digest, self._removed, self._stored)

    def take_changes(self) -> CacheChanged | None:
        """What came and went since the last call; None where that is nothing."""
        if not self._stored and not self._removed:
            return None
        changes = CacheChanged(tuple(self._stored), tuple(self._removed))
        self._stored, self._removed = {}, {}
        return changes

    def snapshot(self) -> CacheChanged:
        """All that is there, for somebody who knows nothing yet."""
        return CacheChanged(tuple(self._blocks), cleared=True)

    def check_integrity(self, unwritten: Collection[int]) -> None:
        """`IntegrityError` where hashes and blocks are not one to one, or a known block is not one of `unwritten`."""
        if self._hashes != {block: digest for digest, block in self._blocks.items()}:
            raise IntegrityError(f"{len(self._blocks)} prefixes are said to be in {len(self._hashes)} blocks")
        if stray := [block for block in self._hashes if block not in unwritten]:
            raise IntegrityError(f"prefixes are said to be in blocks {stray}, which may be written")

    def _hash(self, request: Request, i: int) -> bytes:
        """Of block i of the request, which must be full. Each is made once in the life of the request."""
        hashes = request.block_hashes
        while len(hashes) <= i:
            start = len(hashes) * self._block_size
            parent = hashes[-1] if hashes else root_hash(self._model, request.cache_salt)
            hashes.append(block_hash(parent, request.token_ids(start, start + self._block_size)))
        return hashes[i]


def _note(digest: bytes, to: dict[bytes, None], undone: dict[bytes, None]) -> None:
    """Put a change down, or strike out the earlier one that it undoes."""
    if digest in undone:
        del undone[digest]
    else:
        to[digest] = None
