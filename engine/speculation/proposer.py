"""What guesses the next tokens of requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from core.request import Request


class Proposer(Protocol):
    """Guesses what will be drawn. A wrong guess costs time, never a token: see `Speculator`."""

    @property
    def seconds_per_token(self) -> float:
        """What a guess costs before it is verified; 0 where that is next to nothing."""

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> list[list[int]]:
        """For each request up to that many tokens, to follow all that it knows; fewer where it has no idea."""

    def learn(self, request: Request, token_ids: Sequence[int], drawn: Sequence[int]) -> None:
        """A step computed `token_ids` and drew `drawn[i]` after `token_ids[i]`; what stands after a wrong guess too."""

    def forget(self, request: Request) -> None:
        """The request is over. May be called for one that was never seen."""
