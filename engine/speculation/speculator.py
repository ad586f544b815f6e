"""Speculative decoding: guess several tokens, verify them in one step, keep those that are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from core.request import Request
from engine.plan import Drawn, PlanEntry, StepResult
from engine.speculation.pace import FIRST_RATE, Pace, StepCost
from engine.speculation.proposer import Proposer

FADE = 0.9
"""Weight of a step against the one after it, in tokens per second, and of a request's rate against others'."""


class DraftCounts(NamedTuple):
    """Since the start: times that a request got guesses, guesses, and those that were right."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0

    def plus(self, num_guesses: int, num_right: int) -> DraftCounts:
        return DraftCounts(
            self.num_drafts + 1, self.num_draft_tokens + num_guesses, self.num_accepted_tokens + num_right
        )


class Speculator:
    """Decides how many tokens are guessed for which request, asks a proposer for them, and keeps account.

    **Lossless.** Every guess is a row of the step, and the sampler draws a token for every row. What it draws depends
    on the row's logits, the parameters, the seed and the position, and on a CPU logits do not depend on which rows are
    computed together: so the row after right guesses draws what it would have drawn in a step of its own. A guess is
    right if it is the token drawn; the first wrong one is replaced by what was drawn, the rest is dropped. Greedy or
    sampled, the output is that without guesses, bit for bit; no distribution has to be corrected.

    **Worth it.** One row more costs time, as measured, and in that time other rows would give tokens, as measured too.
    So a guess is made while the chance that it and all before it are right is greater than the number of those tokens.
    Chances are measured request by request, and a new one is taken for one like those before it. Where none is great
    enough nothing is guessed, but for a probe now and then; where all steps have guesses, one now and then has none, to
    see what that costs.
    """

    def __init__(self, proposer: Proposer, max_tokens: int) -> None:
        """At most `max_tokens` guesses for a request in a step."""
        self._proposer, self.max_tokens = proposer, max_tokens
        self._paces: dict[Request, Pace] = {}
        self._cost = StepCost()
        self._rate = FIRST_RATE  # of requests of late
        self._tokens_per_second = 0.0
        self._drafted = False  # in the last step that was timed
        self._counts = DraftCounts()

    @property
    def counts(self) -> DraftCounts:
        return self._counts

    def drafts(self, wanted: Sequence[tuple[Request, int]], budget: int) -> list[list[int]]:
        """Guesses for requests that decode in the next step: for each no more than its limit, in all than `budget`."""
        if self._drafted and not self._cost.varied:
            budget = 0  # a step without, to compare
        least_chance, asked = self._least_chance, []
        for request, limit in wanted:
            if (pace := self._paces.get(request)) is None:
                pace = self._paces[request] = Pace(self._rate)
            num_tokens = pace.length(least_chance, min(limit, self.max_tokens, budget))
            budget -= num_tokens
            asked.append(num_tokens)
        guesses = iter(self._proposer.propose([(r, n) for (r, _), n in zip(wanted, asked, strict=True) if n]))
        return [next(guesses) if num_tokens else [] for num_tokens in asked]

    def observe(self, computed: Sequence[tuple[PlanEntry, Request]], result: StepResult) -> None:
        """What a step drew for its entries, the tokens not yet appended to their requests."""
        num_tokens, only_decodes = 0, True
        for entry, request in computed:
            only_decodes &= entry.sampling is not None and entry.num_tokens == entry.num_drafts + 1
            if entry.sampling is not None and not (drawn := result.drawn[entry.request_id]).failure:
                num_tokens += len(drawn.token_ids)
                self._observe(request, entry, drawn)
        if only_decodes and result.seconds and num_tokens:
            num_rows = sum(entry.num_tokens for entry, _ in computed)
            self._drafted = num_rows > len(computed)
            self._time(num_rows, num_tokens, result.seconds)

    def forget(self, request: Request) -> None:
        """The request is over."""
        self._paces.pop(request, None)
        self._proposer.forget(request)

    def _observe(self, request: Request, entry: PlanEntry, drawn: Drawn) -> None:
        after = entry.token_ids[-entry.num_drafts - 1 :]
        self._proposer.learn(request, after, (*drawn.token_ids, *drawn.in_vain))
        if entry.num_drafts:
            num_right = len(drawn.token_ids) - 1
            self._counts = self._counts.plus(entry.num_drafts, num_right)
            pace = self._paces[request]
            pace.observe(entry.num_drafts, num_right)
            self._rate += (1 - FADE) * (pace.rate - self._rate)

    def _time(self, num_rows: int, num_tokens: int, seconds: float) -> None:
        """A step took that long in which requests do nothing but decode."""
        self._cost.observe(num_rows, seconds)
        tokens_per_second = num_tokens / seconds
        if not self._tokens_per_second:
            self._tokens_per_second = tokens_per_second
        self._tokens_per_second += (1 - FADE) * (tokens_per_second - self._tokens_per_second)

    @property
    def _least_chance(self) -> float:
        """Tokens that the time of a guess and its row gives otherwise."""
        return (self._cost.of_row + self._proposer.seconds_per_token) * self._tokens_per_second
