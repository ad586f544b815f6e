"""The steps of the protocol as a worker takes them, for tests that let something happen at exactly one of them."""

from __future__ import annotations

from enum import Enum
from typing import Protocol


class Step(Enum):
    """A moment on the engine thread, in the order of a request's journey."""

    RESERVE = "reserve"
    """A Reserve has come, and was not looked at."""
    PREFILL = "prefill"
    """A Prefill has come, and was not looked at."""
    PUSH = "push"
    """A layer of a step stands in the cache, and was not sent on."""
    COMMIT = "commit"
    """A prompt is computed and its record made, and no router knows."""
    ACCEPT = "accept"
    """An Accept has come, and was not looked at."""
    RELEASE = "release"
    """A Release has come, and was not looked at."""
    TOKENS = "tokens"
    """Tokens are drawn, and no router knows."""


class StepHook(Protocol):
    """Called before each step, on the engine thread, which goes on when it returns. `layer` is that of a PUSH."""

    def __call__(self, step: Step, layer: int = 0, /) -> None: ...


def pass_by(step: Step, layer: int = 0, /) -> None:
    """Nothing happens: what a worker does outside of tests."""
