"""One request, from the front door to the last token."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, cast, get_args

from core.errors import IntegrityError, InvalidRequestError
from core.kv_layout import WireDtype
from core.logprobs import TokenLogprobs
from core.sampling import SamplingParams

Disaggregation = Literal["require", "prefer", "local"]
"""Prefill and decode on two workers: always, unless one alone is predicted to cost less, or never."""


def disaggregation(name: str) -> Disaggregation:
    """`InvalidRequestError` where it is none."""
    for known in get_args(Disaggregation):
        if known == name:
            return cast("Disaggregation", known)
    raise InvalidRequestError("disaggregate", name, f"must be one of {', '.join(get_args(Disaggregation))}")


class FinishReason(Enum):
    """Why a request ended by itself. Cancel and failure are not among them: they are errors."""

    STOP = "stop"
    LENGTH = "length"


class RequestState(Enum):
    """Where a request stands with a scheduler.

    ```
    WAITING ──▶ RUNNING ──▶ HELD (prefilled, blocks kept for a transfer) ──▶ FINISHED
       ▲         │ │ ▲ ▲
       └─preempt─┘ │ │ └── HELD (reserved on the decode side, waits for its KV)
                   ▼ │
                  PARKED (its KV stands in host memory) ──▶ WAITING, where that copy failed
    any state ──▶ FINISHED
    ```
    """

    WAITING = "waiting"
    RUNNING = "running"
    HELD = "held"
    PARKED = "parked"
    FINISHED = "finished"


_NEXT = {
    RequestState.WAITING: {RequestState.RUNNING, RequestState.HELD, RequestState.FINISHED},
    RequestState.RUNNING: {
        RequestState.WAITING,
        RequestState.HELD,
        RequestState.PARKED,
        RequestState.FINISHED,
    },
    RequestState.PARKED: {RequestState.RUNNING, RequestState.WAITING, RequestState.FINISHED},
    RequestState.HELD: {RequestState.RUNNING, RequestState.FINISHED},
    RequestState.FINISHED: set(),
}


@dataclass(slots=True, eq=False)
class Request:
    """A request and its progress.

    `prompt_token_ids` is what must be prefilled; a resumed request's ends with tokens already streamed, and
    `num_prompt_tokens` says where the client's own prompt ended. `output_token_ids` are those drawn since.
    `num_computed_tokens` counts the positions whose K and V are in the cache, or in host memory while it is parked;
    `num_cached_tokens` those that were there when it first got blocks. `cache_salt` keeps it from sharing cached
    prefixes with requests that have another; `block_hashes` names its first full blocks, as far as somebody wanted to
    know. `prompt_logprobs` are those of the prompt's tokens from the second on, where they are asked for.
    `kv_wire_dtype` is the router's, for its tickets; `priority` (lower goes first) and `user` (whom the client asks
    for) are for its queue, as is `tenant` (whose API key it came with), `traceparent` is for logs.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    num_prompt_tokens: int = -1
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    state: RequestState = RequestState.WAITING
    finish_reason: FinishReason | None = None
    cache_salt: str = ""
    kv_wire_dtype: WireDtype = "auto"
    disaggregate: Disaggregation = "prefer"
    priority: int = 0
    user: str = ""
    traceparent: str = ""
    tenant: str = ""
    num_cached_tokens: int | None = None
    block_hashes: list[bytes] = field(default_factory=list, repr=False)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    _packed: array[int] = field(default_factory=lambda: array("i"), repr=False)

    def __post_init__(self) -> None:
        if self.num_prompt_tokens < 0:
            self.num_prompt_tokens = len(self.prompt_token_ids)

    def advance(self, state: RequestState) -> None:
        """Move to `state`; `IntegrityError` where the automaton has no such edge."""
        if state not in _NEXT[self.state]:
            raise IntegrityError(f"request {self.request_id}: no way from {self.state.name} to {state.name}")
        self.state = state

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_missing_tokens(self) -> int:
        """Known tokens whose K and V are nowhere."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        """Output tokens from the client's point of view: those before a resume count too."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def last_token_id(self) -> int:
        return (self.output_token_ids or self.prompt_token_ids)[-1]

    def token_ids(self, start: int, end: int) -> list[int]:
        """Tokens at positions [start, end) of prompt and output together."""
        num_prompt = len(self.prompt_token_ids)
        if end <= num_prompt:
            return self.prompt_token_ids[start:end]
        return self.prompt_token_ids[start:] + self.output_token_ids[max(0, start - num_prompt) : end - num_prompt]

    def packed_token_ids(self) -> bytes:
        """Tokens of prompt and output together, as int32. Kept from call to call, so only what is new is packed."""
        self._packed.extend(self.token_ids(len(self._packed), self.num_tokens))
        return self._packed.tobytes()

    def prompt_targets(self, start: int, end: int) -> tuple[int, ...]:
        """The prompt's tokens at positions [start + 1, end], where their log-probabilities are still to be told."""
        if self.sampling.prompt_logprobs is None or self.output_token_ids:
            return ()
        return tuple(self.prompt_token_ids[start + 1 : end + 1])

    def append(self, token_id: int, max_model_len: int) -> FinishReason | None:
        """Take a drawn token; returns (and keeps) the reason if it ends the request."""
        self.output_token_ids.append(token_id)
        num_tokens, sampling = self.num_tokens, self.sampling
        num_output_tokens = num_tokens - self.num_prompt_tokens
        if token_id in sampling.stop_token_ids and num_output_tokens > sampling.min_tokens:
            self.finish_reason = FinishReason.STOP
        elif num_output_tokens >= sampling.max_tokens or num_tokens >= max_model_len:
            self.finish_reason = FinishReason.LENGTH
        return self.finish_reason
