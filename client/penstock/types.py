"""What the SDK hands out: plain frozen dataclasses, no wire types. Durations are in seconds."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.compat import StrEnum
from penstock.errors import PenstockError


class FinishReason(StrEnum):
    """Why a generation ended by itself. Cancel and failure are not among them: they are errors."""

    STOP = "stop"
    """An end-of-sequence token, a stop token or a stop string."""
    LENGTH = "length"
    """`max_tokens`, or the model's length."""
    OTHER = "other"
    """A reason that this version of the SDK does not know."""


class WorkerRole(StrEnum):
    """Which phase a worker is there for. `OTHER` is one that this version of the SDK does not know."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. `role` is `"system"`, `"user"` or `"assistant"`, as the chat template has them."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One token and the best ones in its place, by the model's own distribution: before any sampling parameter.

    `rank` is 1 for the best token. `top` are the best and their log-probabilities, best first, as many as asked for.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """The tokens of one or more steps. `text` holds whole characters only, so it may lag behind `token_ids`.

    Where they were asked for, `logprobs` are one for each token, and `prompt_logprobs` come with the first: one for
    each of the prompt's tokens from the second on.
    """

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Usage:
    num_prompt_tokens: int
    num_output_tokens: int

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_output_tokens


@dataclass(frozen=True, slots=True)
class Stats:
    """Where the time of one generation went, told by the server; None where a stage did not happen.

    `ttft_s` and `e2e_s` run from the arrival at the router to its first and last token. `transfer_s` is the time the KV
    channel spent on this request, `transfer_exposed_s` the part of it that computing did not hide. `num_cached_tokens`
    of the prompt were found in the cache of the worker that read it.
    """

    prefill_worker: str = ""
    decode_worker: str = ""
    num_attempts: int = 0
    queue_s: float | None = None
    reserve_s: float | None = None
    prefill_s: float | None = None
    commit_wait_s: float | None = None
    transfer_s: float | None = None
    transfer_exposed_s: float | None = None
    kv_bytes: int | None = None
    num_cached_tokens: int | None = None
    ttft_s: float | None = None
    e2e_s: float | None = None

    @property
    def overlap_ratio(self) -> float | None:
        """Share of the KV transfer that was hidden behind compute, in [0, 1]; None where nothing was transferred."""
        if not self.transfer_s or self.transfer_exposed_s is None:
            return None
        return min(1.0, max(0.0, 1.0 - self.transfer_exposed_s / self.transfer_s))


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one prompt of a batch. Where it failed, `error` says why, and the rest is what had come."""

    request_id: str | None
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None
    usage: Usage | None
    stats: Stats | None
    error: PenstockError | None = None


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """`max_model_len` counts prompt and output together, in tokens."""

    name: str
    architecture: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """One worker as the router sees it. `incarnation` changes with every start of its process."""

    worker_id: str
    incarnation: str
    role: WorkerRole
    address: str
    connected: bool
    draining: bool
    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    device: str


@dataclass(frozen=True, slots=True)
class PairInfo:
    """The KV channel from one worker to another. `reason` says why it is not `up`.

    `transport` is shm, nccl, tcp or gloo.
    """

    prefill_worker: str
    decode_worker: str
    epoch: int
    up: bool
    reason: str
    transport: str


@dataclass(frozen=True, slots=True)
class ServerInfo:
    version: str
    model: str
    uptime_s: float
    num_queued: int
    num_running: int
    workers: tuple[WorkerInfo, ...]
    pairs: tuple[PairInfo, ...]
