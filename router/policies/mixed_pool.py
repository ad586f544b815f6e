"""Splitwise's three pools (Patel et al., ISCA 2024): prompt, token and mixed workers, with overflow between them.

Of each pool the shortest queue is joined. Mixed workers are kept for what the other two can't take in time.
"""

from __future__ import annotations

import random

from core.messages import WorkerRole
from router.policies.least_loaded import fastest
from router.policies.search import Choice, Search

PREFILL, DECODE, MIXED = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.MIXED


class MixedPool:
    name = "mixed_pool"

    def __init__(self, overflow_s: float) -> None:
        """`overflow_s`: predicted wait for a prompt worker above which a mixed one reads the prompt."""
        self._overflow_s = overflow_s

    def choose(self, search: Search, rng: random.Random) -> Choice | None:  # noqa: ARG002 - nothing is drawn
        in_time = search.prefills(PREFILL, max_wait_s=self._overflow_s)
        return (
            search.least(in_time, search.decodes(DECODE), (), "own_pools")
            or search.least(in_time, search.decodes(MIXED), (), "tokens_overflow")
            or search.least(search.prefills(MIXED), search.decodes(DECODE), search.both(), "prompts_overflow")
            or fastest(search, "all_overflow")
        )
