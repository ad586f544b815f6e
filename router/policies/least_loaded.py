"""Least loaded: where the request is predicted to be done first, by the work that waits and how fast each worker is."""

from __future__ import annotations

import random

from router.policies.search import Choice, Search


class LeastLoaded:
    """Predicts times, not counts: a fast worker with a longer queue may be the better one."""

    name = "least_loaded"

    def choose(self, search: Search, rng: random.Random) -> Choice | None:  # noqa: ARG002 - nothing is drawn
        return fastest(search, "least_loaded")


def fastest(search: Search, why: str) -> Choice | None:
    """The earliest predicted end of all routes with room."""
    return search.least(search.prefills(), search.decodes(), search.both(), why)
