"""What router and worker say to each other, as typed values; `router/rpc.py` and `cluster/rpc.py` put them on the wire.

Commands go to a worker, events come from it. Every command is idempotent by the key of its ticket.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from core.kv_layout import KVLayout
from core.logprobs import TokenLogprobs
from core.request import FinishReason
from core.sampling import SamplingParams
from core.ticket import AttemptKey, CommitRecord, Ticket

WIRE_VERSION = 1


class WorkerRole(Enum):
    """What a worker admits. Every worker could do both: the role is policy, not code."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


@dataclass(frozen=True, slots=True)
class RouterHello:
    router_id: str
    incarnation: str
    wire_version: int = WIRE_VERSION
    nonce: bytes = b""


@dataclass(frozen=True, slots=True)
class WorkerHello:
    """`credits`: requests the session may have on the worker at once. `kv_address`: where pairs with it meet, of which
    it has room for `max_pairs`. `runs_alone`: it takes local tickets, whatever its role."""

    worker_id: str
    incarnation: str
    role: WorkerRole
    layout: KVLayout
    credits: int
    num_blocks: int
    max_model_len: int
    kv_address: str
    device: str
    max_pairs: int
    runs_alone: bool = False
    wire_version: int = WIRE_VERSION


@dataclass(frozen=True, slots=True)
class Load:
    """A worker's state, sent with every batch of events and at least once a second.

    Some of the waiting are parked, and hold `parked_bytes` of host memory.

    From the worker's start are counted: preemptions, how often what a request had computed was kept in host memory
    (parks) or lost (recomputes), tokens looked up and found in the prefix cache, and drafts: times that tokens were
    guessed, how many, and how many were right.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_held: int = 0
    num_free_blocks: int = 0
    num_preemptions: int = 0
    num_waiting_tokens: int = 0
    draining: bool = False
    num_prefix_queries: int = 0
    num_prefix_hits: int = 0
    mask_wait_s: float = 0.0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_parked: int = 0
    parked_bytes: int = 0
    num_parks: int = 0
    num_recomputes: int = 0


# ---- commands


@dataclass(frozen=True, slots=True)
class Connect:
    """Build the channel of a pair; answered by PairUp or PairDown.

    Each side proves to the other that it was told the `secret`; with none, nobody is asked.
    """

    prefill_incarnation: str
    decode_incarnation: str
    epoch: int
    store_address: str
    peer_layout: KVLayout
    secret: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class Disconnect:
    """End the channel of a pair; without effect where it is of another epoch."""

    prefill_incarnation: str
    decode_incarnation: str
    epoch: int


@dataclass(frozen=True, slots=True)
class PromptPart:
    """Tokens of a long prompt at `offset`, ahead of the command that carries the rest."""

    ticket: Ticket
    offset: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """What to run. `token_ids` starts at `prompt_offset` (the tokens before came in PromptPart).

    `num_prompt_tokens` is the length of the client's own prompt; a resumed request's tokens go beyond it. Cached
    prefixes are shared only among requests of the same `cache_salt`. After `timeout_s` the worker ends the attempt.
    """

    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    sampling: SamplingParams
    prompt_offset: int = 0
    cache_salt: str = ""
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Reserve:
    """With `copy` the worker keeps what comes in its cache, and decodes nothing: taken whatever the role."""

    ticket: Ticket
    work: Work
    copy: bool = False


@dataclass(frozen=True, slots=True)
class Prefill:
    """With a local ticket the worker decodes as well: no Reserve, no Accept.

    With `handover` it goes on with another worker, that of the ticket, what this one has decoded so far: K and V are in
    its cache, but for the last few. Every worker does that, whatever its role, and while it drains. With `copy` as well
    it fails unless all but the last token are in the cache.
    """

    ticket: Ticket
    work: Work
    num_skipped_tokens: int = 0
    handover: bool = False
    copy: bool = False


@dataclass(frozen=True, slots=True)
class Accept:
    """`deadline_s`: how long to wait for the last segment."""

    ticket: Ticket
    record: CommitRecord
    first_token_id: int
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Release:
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Cancel:
    ticket: Ticket
    reason: str


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Renews the leases of what the router still wants."""

    live_transfer_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Drain:
    deadline_s: float


@dataclass(frozen=True, slots=True)
class FlushCache:
    """Forget the prefixes that no request holds; answered by CacheFlushed, in order."""


Command = (
    Connect | Disconnect | PromptPart | Reserve | Prefill | Accept | Release | Cancel | Heartbeat | Drain | FlushCache
)

# ---- events


@dataclass(frozen=True, slots=True)
class PairUp:
    """`transport`: what carries the payload."""

    prefill_incarnation: str
    decode_incarnation: str
    epoch: int
    transport: str = ""


@dataclass(frozen=True, slots=True)
class PairDown:
    """`permanent`: the two can never pair, for their models or layouts differ, or no transport suits both."""

    prefill_incarnation: str
    decode_incarnation: str
    epoch: int
    reason: str
    permanent: bool = False


@dataclass(frozen=True, slots=True)
class Reserved:
    key: AttemptKey
    num_skipped_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Refused:
    """No room now: nothing is held, and the router keeps the request in its queue."""

    key: AttemptKey
    reason: str


@dataclass(frozen=True, slots=True)
class Prefilled:
    """With `finish` set the first token ended the request: nothing is held and there is no decode.

    `logprobs` is that of the first token, where it was asked for. `num_cached_tokens` were in the cache already.
    """

    key: AttemptKey
    first_token_id: int
    finish: FinishReason | None
    record: CommitRecord | None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Accepted:
    key: AttemptKey
    commit_wait_s: float


@dataclass(frozen=True, slots=True)
class TransferStats:
    """`transfer_s`: channel time spent on the segments; `exposed_s`: end of compute to last segment sent."""

    num_bytes: int
    transfer_s: float
    exposed_s: float


@dataclass(frozen=True, slots=True)
class Released:
    """Answers Release and Cancel: the worker holds nothing of this attempt any more."""

    key: AttemptKey
    transfer: TransferStats | None = None


@dataclass(frozen=True, slots=True)
class SequenceTokens:
    key: AttemptKey
    token_ids: tuple[int, ...]
    finish: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class StepTokens:
    """All new tokens of one step."""

    sequences: tuple[SequenceTokens, ...]


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """The attempt is over on this worker. `reason` is machine-readable: it labels metrics."""

    key: AttemptKey
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class CacheChanged:
    """KV blocks, by their hashes, that requests on this worker find from now on, and that they no longer find.

    With `cleared`, forget all that was said before; a session begins with that.
    """

    stored: tuple[bytes, ...] = ()
    removed: tuple[bytes, ...] = ()
    cleared: bool = False


@dataclass(frozen=True, slots=True)
class Drained:
    pass


@dataclass(frozen=True, slots=True)
class CacheFlushed:
    """So many blocks were forgotten."""

    num_blocks: int


Event = (
    PairUp
    | PairDown
    | Reserved
    | Refused
    | Prefilled
    | Accepted
    | Released
    | StepTokens
    | AttemptFailed
    | CacheChanged
    | CacheFlushed
    | Drained
)
