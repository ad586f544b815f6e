"""What one request came to, as its client saw it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Record:
    """Times are seconds after the start of the load; everything is measured from `due_s`.

    That is when the request was to be sent, not when this process got round to it at `sent_s`: a server that slows its
    load generator down gains nothing by it. `tokens_s` are the times of the messages that brought tokens; the counts
    are the server's where it told them. `error` is empty where all went well.
    """

    index: int
    due_s: float
    sent_s: float
    end_s: float
    tokens_s: tuple[float, ...]
    num_inputs: int
    num_outputs: int
    error: str = ""

    @property
    def ttft_s(self) -> float | None:
        return self.tokens_s[0] - self.due_s if self.tokens_s else None

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """Between messages with tokens, in order."""
        return tuple(later - earlier for earlier, later in itertools.pairwise(self.tokens_s))

    @property
    def longest_gap_s(self) -> float | None:
        return max(self.gaps_s, default=None)

    @property
    def tpot_s(self) -> float | None:
        """Mean time of an output token after the first; None where there is none."""
        if self.num_outputs < 2 or not self.tokens_s:
            return None
        return (self.end_s - self.tokens_s[0]) / (self.num_outputs - 1)

    @property
    def e2e_s(self) -> float | None:
        """To the end of the answer: not to its last message with tokens, for not every token may have had one."""
        return self.end_s - self.due_s if self.tokens_s else None

    def value_s(self, metric: str) -> float | None:
        """By the names of `benchmarks.serve.report.METRICS`, but for itl, which has many."""
        values = {"ttft": self.ttft_s, "tpot": self.tpot_s, "e2el": self.e2e_s, "max_itl": self.longest_gap_s}
        return values[metric]
