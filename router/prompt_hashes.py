"""Names of a request's blocks, made once, for the caches that are there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from core.block_hash import block_hash, root_hash
from core.request import Request
from router.policies.model import CacheKind


@dataclass(slots=True)
class PromptHashes:
    """By kind of cache. Grows with the request: what was named once keeps its name."""

    by_cache: dict[CacheKind, list[bytes]] = field(default_factory=dict)

    def of(self, request: Request, caches: Iterable[CacheKind]) -> Mapping[CacheKind, Sequence[bytes]]:
        """All full blocks but the one of the last token, which no cache serves.

        Empty where the log-probabilities of the prompt are wanted: all of it must be computed then.
        """
        if request.sampling.prompt_logprobs is not None:
            return {}
        for cache in caches:
            contents, block_size = cache
            hashes = self.by_cache.setdefault(cache, [])
            for i in range(len(hashes), (request.num_tokens - 1) // block_size):
                parent = hashes[-1] if hashes else root_hash(contents, request.cache_salt)
                hashes.append(block_hash(parent, request.token_ids(i * block_size, (i + 1) * block_size)))
        return self.by_cache
