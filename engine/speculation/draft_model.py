"""What a smaller model would write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from core.request import Request
from core.sampling import SamplingParams
from engine.block_pool import BlockPool
from engine.plan import Plan, PlanEntry
from engine.runner import Runner

FADE = 0.9
"""Weight of a step against the one after it, in what a guess costs."""
MAX_TOKENS_TOGETHER = 16
"""Tokens of a request that are new to the smaller model and are computed in one step with those of others."""


@dataclass(slots=True)
class _Progress:
    """K and V of the first `num_computed` tokens are there, and behind them those of `guesses`, right or wrong."""

    sampling: SamplingParams
    num_computed: int = 0
    guesses: list[int] = field(default_factory=list)

    def catch_up(self, request: Request) -> None:
        """Guesses that were right count as computed."""
        known = request.token_ids(self.num_computed, request.num_tokens - 1)
        for token_id, guess in zip(known, self.guesses, strict=False):
            if token_id != guess:
                break
            self.num_computed += 1
        self.guesses.clear()


class DraftModelProposer:
    """Runs a smaller model ahead of the large one, for all requests together, a token a step.

    It draws as the request does, with its seed and for the same position: so of two models that agree the draws agree,
    greedy or not. What parameters make of earlier tokens, and grammars, it does not know.

    It owns K and V of its own in a pool of its own; a request holds blocks there from its first guess to its end. One
    that finds no room gets no guesses.
    """

    def __init__(self, runner: Runner, pool: BlockPool, max_model_len: int, max_num_batched_tokens: int) -> None:
        self._runner, self._pool = runner, pool
        self._max_model_len, self._max_num_batched_tokens = max_model_len, max_num_batched_tokens
        self._progress: dict[Request, _Progress] = {}
        self._seconds_per_token = 0.0

    @property
    def seconds_per_token(self) -> float:
        return self._seconds_per_token

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> list[list[int]]:
        guesses: dict[Request, list[int]] = {request: [] for request, _ in wanted}
        served = [(request, limit) for request, limit in wanted if self._has_room(request, limit)]
        for request, _ in served:
            self._prefill(request)
        for i in range(max((limit for _, limit in served), default=0)):
            entries = [self._entry(request, guesses[request]) for request, limit in served if i < limit]
            result = self._runner.run(Plan(tuple(entries)))
            for request, limit in served:
                if i < limit:
                    guesses[request] += result.drawn[request.request_id].token_ids
            if i > 0:  # the first computes more than one token for some
                seconds = result.seconds / len(entries)
                self._seconds_per_token += (1 - FADE if self._seconds_per_token else 1) * (
                    seconds - self._seconds_per_token
                )
        for request, _ in served:
            progress = self._progress[request]
            progress.num_computed, progress.guesses = request.num_tokens, guesses[request][:-1]
        return list(guesses.values())

    def learn(self, request: Request, token_ids: Sequence[int], drawn: Sequence[int]) -> None:
        """All it needs is in the requests."""

    def forget(self, request: Request) -> None:
        if self._progress.pop(request, None) is not None:
            self._pool.free(request.request_id)

    def _has_room(self, request: Request, limit: int) -> bool:
        num_tokens = request.num_tokens + limit
        return num_tokens <= self._max_model_len and self._pool.allocate(request.request_id, num_tokens)

    def _prefill(self, request: Request) -> None:
        """Compute what is new to the smaller model, but for a few tokens that go with the first guess."""
        if (progress := self._progress.get(request)) is None:
            progress = self._progress[request] = _Progress(_plain(request.sampling))
        progress.catch_up(request)
        while (num_missing := request.num_tokens - progress.num_computed) > MAX_TOKENS_TOGETHER:
            start = progress.num_computed
            progress.num_computed += min(num_missing - 1, self._max_num_batched_tokens)
            self._runner.run(Plan((self._part(request, start, progress.num_computed),)))

    def _part(self, request: Request, start: int, end: int) -> PlanEntry:
        tokens = tuple(request.token_ids(start, end))
        return PlanEntry(request.request_id, tokens, start, self._pool.table(request.request_id), None)

    def _entry(self, request: Request, guesses: list[int]) -> PlanEntry:
        """The last guess, or before the first one the known tokens that are not computed yet."""
        progress, table = self._progress[request], self._pool.table(request.request_id)
        start = request.num_tokens + len(guesses) - 1 if guesses else progress.num_computed
        tokens = guesses[-1:] or request.token_ids(start, request.num_tokens)
        return PlanEntry(request.request_id, tuple(tokens), start, table, progress.sampling)


def _plain(sampling: SamplingParams) -> SamplingParams:
    """Without what looks back."""
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed,
    )
