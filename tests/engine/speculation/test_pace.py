"""How many guesses are made: what a row costs, how often guesses are right, and when to give up."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from core.request import Request
from core.sampling import SamplingParams
from engine.plan import Drawn, PlanEntry, StepResult
from engine.speculation.pace import PROBE_INTERVAL, PROBE_TOKENS, Pace, StepCost
from engine.speculation.speculator import Speculator

GREEDY = SamplingParams(max_tokens=10**6, temperature=0)


def test_cost_is_the_line_through_steps_of_different_sizes() -> None:
    cost = StepCost()
    for num_rows in (1, 4, 2, 8, 3):
        cost.observe(num_rows, 0.010 + 0.002 * num_rows)
    assert cost.of_row == pytest.approx(0.002)
    assert cost.of_step(5) == pytest.approx(0.020)


def test_a_row_counts_as_free_until_sizes_differ() -> None:
    cost = StepCost()
    for _ in range(50):
        cost.observe(3, 0.01)
    assert cost.of_row == 0.0


def test_cost_follows_a_machine_that_changes() -> None:
    cost = StepCost()
    for i in range(600):
        per_row = 0.001 if i < 300 else 0.004
        cost.observe(1 + i % 4, 0.010 + per_row * (1 + i % 4))
    assert cost.of_row == pytest.approx(0.004, rel=0.05)


def test_a_step_that_was_held_up_hardly_counts() -> None:
    cost = StepCost()
    for i in range(200):
        cost.observe(1 + i % 4, 5.0 if i == 150 else 0.010 + 0.001 * (1 + i % 4))
    assert cost.of_step(2) < 0.014


def test_all_are_guessed_where_rows_are_free() -> None:
    assert Pace().length(0.0, 8) == 8


def test_guesses_are_as_many_as_pay() -> None:
    """At a rate of 0.7: 0.7, 0.49, 0.34, 0.24."""
    assert [Pace().length(chance, 8) for chance in (0.6, 0.4, 0.3, 0.2)] == [1, 2, 3, 4]


def test_a_rate_of_one_is_no_problem() -> None:
    pace = Pace()
    for _ in range(1000):
        pace.observe(8, 8)
    assert pace.length(0.1, 8) == 8


def test_of_whom_nothing_is_expected_may_prove_the_contrary_at_once() -> None:
    pace = Pace(0.05)
    assert pace.length(0.1, 8) == PROBE_TOKENS
    pace.observe(PROBE_TOKENS, PROBE_TOKENS)
    assert pace.length(0.1, 8) > 0


def test_who_is_always_wrong_gives_up_and_tries_again_rarely() -> None:
    pace = Pace()
    lengths = []
    for _ in range(10 * PROBE_INTERVAL):
        lengths.append(pace.length(0.1, 8))
        if lengths[-1]:
            pace.observe(lengths[-1], 0)
    later = lengths[2 * PROBE_INTERVAL :]
    assert set(later) == {0, PROBE_TOKENS}
    assert later.count(PROBE_TOKENS) == 8


class Machine:
    """Steps that cost `base` + `per_row` x rows, and guesses that are right with the same chance each."""

    seconds_per_token = 0.0

    def __init__(self, chance: float, base: float, per_row: float, num_requests: int = 1) -> None:
        self._chance, self._base, self._per_row = chance, base, per_row
        self._random = random.Random(1)
        self._requests = [Request(str(i), [1], GREEDY) for i in range(num_requests)]
        self.speculator = Speculator(self, 8)
        self.num_rows = 0

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> list[list[int]]:
        return [[1] * limit for _, limit in wanted]

    def learn(self, request: Request, token_ids: Sequence[int], drawn: Sequence[int]) -> None:
        pass

    def forget(self, request: Request) -> None:
        pass

    def step(self, speculate: bool = True) -> tuple[int, float]:
        """Tokens and seconds of a step."""
        drafts = self.speculator.drafts([(r, 100 * speculate) for r in self._requests], 512)
        entries = [
            PlanEntry(r.request_id, (1, *d), 0, (), GREEDY, num_drafts=len(d))
            for r, d in zip(self._requests, drafts, strict=True)
        ]
        drawn = {entry.request_id: self._draw(entry.num_drafts) for entry in entries}
        self.num_rows = sum(entry.num_tokens for entry in entries)
        seconds = self._base + self._per_row * self.num_rows
        self.speculator.observe(list(zip(entries, self._requests, strict=True)), StepResult(drawn, seconds=seconds))
        return sum(len(d.token_ids) for d in drawn.values()), seconds

    def _draw(self, num_drafts: int) -> Drawn:
        num_right = 0
        while num_right < num_drafts and self._random.random() < self._chance:
            num_right += 1
        return Drawn((1,) * (num_right + 1))

    def rate(self, num_steps: int) -> float:
        """Tokens a second, after a while."""
        for _ in range(100):
            self.step()
        steps = [self.step() for _ in range(num_steps)]
        return sum(tokens for tokens, _ in steps) / sum(seconds for _, seconds in steps)


@pytest.mark.parametrize("num_requests", [1, 16])
@pytest.mark.parametrize("per_row", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("chance", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_guessing_never_costs_much_and_is_near_the_best(chance: float, per_row: float, num_requests: int) -> None:
    """Against the best fixed number of guesses, worked out by hand."""

    def fixed(n: int) -> float:
        tokens = sum(chance**i for i in range(n + 1))
        return num_requests * tokens / (1.0 + per_row * num_requests * (1 + n))

    machine = Machine(chance, 1.0, per_row, num_requests)
    assert machine.rate(800) > 0.85 * max(fixed(n) for n in range(9))


def test_a_budget_is_not_exceeded() -> None:
    machine = Machine(1.0, 1.0, 0.0, num_requests=3)
    drafts = machine.speculator.drafts([(r, 100) for r in machine._requests], 10)
    assert [len(guesses) for guesses in drafts] == [8, 2, 0]


def test_guesses_and_those_that_were_right_are_counted() -> None:
    """Of three steps the second has none, to see what that costs."""
    machine = Machine(1.0, 1.0, 0.0)
    assert [machine.step()[0] for _ in range(3)] == [9, 1, 9]
    machine.step(speculate=False)
    assert machine.speculator.counts == (2, 16, 16)
