"""Both ends of a real KV channel in one process, under real schedulers; only the model is missing.

Instead of computing, a step writes values into the cache that are different for every token, layer and position, and
draws tokens that tell where they stand.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence

import torch

from core.kv_layout import KVLayout
from core.messages import Accept, Connect, Event, PairUp, Prefill, Reserve, Work
from core.sampling import SamplingParams
from core.ticket import AttemptKey, CommitRecord, Ticket
from engine.block_pool import BlockPool
from engine.kv_storage import KVStorage
from engine.plan import Drawn, Plan, StepOutput, StepResult
from engine.prefix_index import PrefixIndex
from engine.scheduler import Scheduler
from kv_transfer.config import TransferConfig
from kv_transfer.events import KVEvent
from kv_transfer.plane import KVPlane
from kv_transfer.reshard import Group, ReshardPlan

WAIT_S = 10.0
NUM_BLOCKS, BLOCK_SIZE, MAX_SEQS, BUDGET = 16, 4, 3, 8
LAYOUT = KVLayout("toy", "f", num_layers=2, num_kv_heads=2, head_size=4, block_size=BLOCK_SIZE, dtype="float32")
PLAN = ReshardPlan(Group(LAYOUT), Group(LAYOUT))
PATIENT = TransferConfig(lease_s=120.0, silence_timeout_s=30.0, keepalive_s=0.1)
PROMPT = tuple(range(10, 23))
"""13 tokens: two steps, four blocks with the token drawn from it."""
FIRST_TOKEN = 1000 + len(PROMPT)


def ticket(name: str = "t", attempt: int = 1, *, prefill: str = "p", decode: str = "d", epoch: int = 1) -> Ticket:
    return Ticket(f"request of {name}", attempt, name, prefill, decode, epoch)


def work(
    token_ids: Sequence[int] = PROMPT, max_tokens: int = 4, stop_token_ids: tuple[int, ...] = (), num_streamed: int = 0
) -> Work:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0, stop_token_ids=stop_token_ids)
    return Work(tuple(token_ids), len(token_ids) - num_streamed, sampling)


def reserve(name: str = "t", attempt: int = 1, the_work: Work | None = None) -> Reserve:
    return Reserve(ticket(name, attempt), the_work or work())


def prefill(name: str = "t", attempt: int = 1, the_work: Work | None = None, num_skipped: int = 0) -> Prefill:
    return Prefill(ticket(name, attempt), the_work or work(), num_skipped)


def accept(record: CommitRecord, name: str = "t", attempt: int = 1, first_token_id: int = FIRST_TOKEN) -> Accept:
    return Accept(ticket(name, attempt), record, first_token_id, WAIT_S)


def kv(layer: int, token_ids: Sequence[int], start: int) -> torch.Tensor:
    """What a step writes for tokens from position `start` on, K and V [2, T, K, D] float32, as a payload."""
    places = torch.arange(start, start + len(token_ids), dtype=torch.float32)
    base = 1e4 * layer + 100 * places + torch.tensor(token_ids, dtype=torch.float32)
    return (base.view(1, -1, 1, 1) + torch.arange(16.0).view(2, 1, 2, 4) / 32).flatten().view(torch.uint8)


class Side:
    """Pool, scheduler, cache and KV plane of one worker."""

    def __init__(self, incarnation: str, caching: bool) -> None:
        self.incarnation = incarnation
        self.storage = KVStorage(LAYOUT, NUM_BLOCKS, torch.device("cpu"))
        self.told: queue.Queue[KVEvent] = queue.Queue()
        self.plane = KVPlane(incarnation, self.storage, "127.0.0.1", PATIENT, time.monotonic, self.told.put)
        index = PrefixIndex(LAYOUT.contents, BLOCK_SIZE) if caching else None
        self.pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE, index)
        self.scheduler = Scheduler(
            self.pool,
            max_num_batched_tokens=BUDGET,
            max_num_seqs=MAX_SEQS,
            max_model_len=NUM_BLOCKS * BLOCK_SIZE,
        )
        self.events: list[Event] = []

    def step(self, on_layer: Callable[[Plan, int], object] = lambda plan, layer: None) -> list[StepOutput]:
        """One whole step. A token is drawn as 1000 + its position."""
        plan = self.scheduler.schedule()
        if not plan:
            return []
        for layer in range(LAYOUT.num_layers):
            for entry in plan.entries:
                values = kv(layer, entry.token_ids, entry.start)
                self.storage.write(layer, entry.block_ids, entry.start, entry.end, values)
            on_layer(plan, layer)
        drawn = {e.request_id: Drawn((1000 + e.end,)) for e in plan.entries if e.sampling}
        return self.scheduler.update(plan, StepResult(drawn))

    def taken(self) -> list[Event]:
        """Events since the last call."""
        events = self.events.copy()
        self.events.clear()
        return events

    def assert_nothing_is_held(self) -> None:
        self.scheduler.check_integrity()
        assert not self.scheduler.requests
        assert self.pool.num_free_blocks == self.pool.num_blocks

    def assert_forgot(self, key: AttemptKey) -> None:
        """Neither side of the KV plane claims anything for the attempt: it expires never."""
        assert key not in [expired for expired, _ in self.plane.expired(float("inf"))]


class Pair:
    """A sender and a receiver whose channel is up."""

    def __init__(self, caching: bool = False) -> None:
        self.sender, self.receiver = Side("p", caching), Side("d", caching)
        command = Connect("p", "d", 1, self.receiver.plane.address, LAYOUT)
        for side in (self.sender, self.receiver):
            side.plane.connect(command)
        for side in (self.sender, self.receiver):
            assert side.told.get(timeout=WAIT_S) == PairUp("p", "d", 1, "shm")

    def close(self) -> None:
        self.sender.plane.close()
        self.receiver.plane.close()
