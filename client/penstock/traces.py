"""What happened to one request, as the router remembers it. Plain frozen dataclasses, no wire types."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """A stage of a request; `end_s` is None while it goes on.

    With `slack_s` the worker told how long it took, and its place is inferred: the router's own times around it leave
    that much room.
    """

    name: str
    attempt: int
    worker: str
    start_s: float
    end_s: float | None
    slack_s: float | None


@dataclass(frozen=True, slots=True)
class Forecast:
    """What was predicted when workers were chosen, from then on. Cached tokens are those of the prompt that each of the
    two was thought to have."""

    ttft_s: float
    itl_s: float
    finish_s: float
    num_cached_prefill: int
    num_cached_decode: int


@dataclass(frozen=True, slots=True)
class AttemptTrace:
    """One choice of workers, with its `reasons`, and what came of it: `outcome` is running, refused, failed, or the
    request's own.

    `num_tokens` were to be prefilled. `waited_for` is what stood in the way before, when the request was first in the
    queue.
    """

    attempt: int
    placed_s: float
    prefill_worker: str
    decode_worker: str
    reasons: tuple[str, ...]
    num_tokens: int
    outcome: str
    detail: str
    kv_bytes: int | None
    transfer_s: float | None
    transfer_exposed_s: float | None
    policy: str = ""
    forecast: Forecast | None = None
    first_token_s: float | None = None
    waited_for: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RequestTrace:
    """Times are seconds after the request's arrival, on the router's clock.

    `outcome` is queued or running, then stop, length, cancelled, or the code of the error that `detail` tells.
    `longest_gap_s` is the longest between two messages with tokens, and ended at `longest_gap_at_s`.
    """

    request_id: str
    arrived_unix_s: float
    elapsed_s: float
    outcome: str
    detail: str
    num_prompt_tokens: int
    num_output_tokens: int
    longest_gap_s: float
    longest_gap_at_s: float
    attempts: tuple[AttemptTrace, ...]
    num_forgotten_attempts: int
    spans: tuple[Span, ...]
