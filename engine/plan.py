"""What one step computes. No prefill or decode mode: a mixed step is just a plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from core.logprobs import TokenLogprobs
from core.request import FinishReason, Request
from core.sampling import SamplingParams


class PlanEntry(NamedTuple):
    """Compute `token_ids` of a request at positions [start, start + len(token_ids)), K and V going into `block_ids`.

    `block_ids[i]` holds positions [i * block_size, (i + 1) * block_size) of the request. Where `sampling` is set, the
    logits of the last token are sampled with it; the drawn token stands at position `start + len(token_ids)`.

    The last `num_drafts` tokens are guesses of what will be drawn: then the token before them and each of them are
    sampled, every one at its own position. The first draws that equal the guesses are taken, and one more.
    """

    request_id: str
    token_ids: tuple[int, ...]
    start: int
    block_ids: tuple[int, ...]
    sampling: SamplingParams | None
    num_output_tokens: int = 0
    """Output tokens drawn before this step: while below `min_tokens`, stop tokens can't be drawn."""
    num_drafts: int = 0
    history: bytes = b""
    """All tokens of the request but the drafts, as int32, where `sampling` looks back at them."""
    prompt_targets: tuple[int, ...] = ()
    """The prompt's tokens at positions `start + 1` on whose log-probabilities are asked for, and `num_prompt_top` best
    in the place of each."""
    num_prompt_top: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


class Swap(NamedTuple):
    """Blocks of a request's KV and those of host memory that hold the same, one each."""

    request_id: str
    block_ids: tuple[int, ...]
    host_block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: self-contained, so that it can be sent to the other ranks of a group as it is.

    First all of `swaps_out` are copied to host memory, then all of `swaps_in` from there, then `entries` are computed.
    """

    entries: tuple[PlanEntry, ...]
    preempted: tuple[str, ...] = ()
    """Requests whose blocks were taken back to make room, and that compute anew; they wait again."""
    swaps_out: tuple[Swap, ...] = ()
    """Of requests that are parked; their blocks are others' from then on."""
    swaps_in: tuple[Swap, ...] = ()
    """Of requests that are parked no longer: each has an entry."""

    @property
    def num_tokens(self) -> int:
        return sum(entry.num_tokens for entry in self.entries)

    def __bool__(self) -> bool:
        return bool(self.entries or self.swaps_out)


class Drawn(NamedTuple):
    """What a step drew for one entry: one token, or several where drafts were right. `logprobs`: one each, if asked.

    `failure` says why nothing could be drawn for this one request. `in_vain` is what was drawn behind a wrong draft: no
    output, but it may be guessed next time.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    failure: str = ""
    in_vain: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """Tokens drawn by a step, by request id: for each entry with `sampling`. Log-probabilities of `prompt_targets`.

    `seconds` is what the computation took.
    """

    drawn: dict[str, Drawn]
    prompt_logprobs: dict[str, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    seconds: float = field(default=0.0, compare=False)


class StepOutput(NamedTuple):
    """What a step meant for one request that drew tokens: those it took, up to its end if it came to that."""

    request: Request
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprobs, ...] = ()
