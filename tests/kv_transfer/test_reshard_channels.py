"""Caches of groups, moved by a plan over a real channel from each rank to each that it serves."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from core.kv_layout import KVLayout
from core.messages import Connect
from core.ticket import CommitRecord, Segment, SegmentRecord
from engine.kv_storage import KVStorage
from kernels.checksum import checksum
from kernels.paged_kv import token_views
from kv_transfer.channel import ReceiveChannel, SendChannel
from kv_transfer.frame import Entry
from kv_transfer.outbox import Outgoing
from kv_transfer.rendezvous import RECEIVER, SENDER, GroupRendezvous
from kv_transfer.reshard import Group, ReshardPlan
from kv_transfer.transport import Transport
from tests.kv_transfer.harness import HOST, QUICK, WAIT_S, plane_threads

CPU = torch.device("cpu")
KEY = ("transfer", 1)
NUM_TOKENS, NUM_SKIPPED, MAX_CELLS = 29, 3, 60


class Ranks:
    """The caches of a group's ranks, and the block table that all of them use for the one request."""

    def __init__(self, group: Group) -> None:
        self.group = group
        num_blocks = -(-NUM_TOKENS // group.layout.block_size)
        self.table = random.Random(group.tp_size).sample(range(num_blocks), num_blocks)
        self.storages = [
            KVStorage(replace(group.layout, num_kv_heads=len(group.kv_heads(rank))), num_blocks, CPU)
            for rank in range(group.tp_size)
        ]

    def read(self, rank: int, segment: Segment) -> Tensor:
        s = segment
        return self.storages[rank].read(s.layer, self.table, s.token_start, s.token_end, self._local(rank, s))

    def write(self, rank: int, segment: Segment, payload: Tensor) -> None:
        s = segment
        self.storages[rank].write(s.layer, self.table, s.token_start, s.token_end, payload, self._local(rank, s))

    def all_of(self, rank: int, layer: int, start: int) -> Segment:
        """What a rank holds of a layer from position `start` on."""
        held = self.group.kv_heads(rank)
        return Segment(layer, held.start, held.stop, start, NUM_TOKENS)

    def _local(self, rank: int, segment: Segment) -> tuple[int, int]:
        first = self.group.kv_heads(rank).start
        return segment.kv_head_start - first, segment.kv_head_end - first


class Links:
    """A channel for each two ranks between which the plan has a route; what arrives is written where it belongs."""

    def __init__(self, plan: ReshardPlan, target: Ranks, stack: ExitStack) -> None:
        self.arrived: queue.SimpleQueue[SegmentRecord] = queue.SimpleQueue()
        self.senders: dict[tuple[int, int], SendChannel] = {}
        self._target = target
        here, there = (GroupRendezvous(HOST, CPU, QUICK) for _ in range(2))
        stack.callback(here.close)
        stack.callback(there.close)
        for ours, theirs in sorted({(route.sender_rank, route.receiver_rank) for route in plan.routes}):
            connect = Connect(f"p{ours}", f"d{theirs}", 1, there.address, plan.receiver.layout)
            self._open(ours, theirs, *meet(connect, here, there), stack)

    def _open(self, ours: int, theirs: int, out: Transport, back: Transport, stack: ExitStack) -> None:
        name = f"{ours}-{theirs}"
        sender = SendChannel(name, out, QUICK, time.monotonic, lambda *_: None, lambda _: None)
        receiver = ReceiveChannel(name, back, QUICK, lambda e, p: self._take(theirs, e, p), lambda _: None)
        self.senders[ours, theirs] = sender
        for channel in (receiver, sender):
            channel.start()
            stack.callback(channel.thread.join, WAIT_S)
            stack.callback(channel.close)

    def _take(self, rank: int, entry: Entry, payload: Tensor) -> None:
        segment = entry.record.segment
        if segment.receiver_rank == rank and checksum(payload) == entry.record.checksum:
            self._target.write(rank, segment, payload)
            self.arrived.put(entry.record)


def meet(connect: Connect, here: GroupRendezvous, there: GroupRendezvous) -> tuple[Transport, Transport]:
    met: queue.SimpleQueue[Transport] = queue.SimpleQueue()
    visit = threading.Thread(target=lambda: met.put(here.meet(connect, SENDER)))
    visit.start()
    back = there.meet(connect, RECEIVER)
    return met.get(timeout=WAIT_S), back


@contextmanager
def links(plan: ReshardPlan, target: Ranks) -> Iterator[Links]:
    with ExitStack() as stack:
        yield Links(plan, target, stack)
    assert plane_threads() == []


def fill(model: Ranks, source: Ranks) -> None:
    """Random values for a group of one, and the same for the ranks of another."""
    (whole,) = model.storages
    for cached in whole.layers:
        for view in token_views(cached):
            view.copy_(30 * torch.randn(view.shape))
    for rank, layer in product(range(source.group.tp_size), range(whole.layout.num_layers)):
        source.write(rank, held := source.all_of(rank, layer, 0), model.read(0, held))


def send(plan: ReshardPlan, source: Ranks, moving: Links) -> list[SegmentRecord]:
    """All layers in two chunks, each segment over the channel of its ranks."""
    sent = []
    chunks = ((NUM_SKIPPED, 17), (17, NUM_TOKENS))
    for layer, chunk, rank in product(range(plan.sender.layout.num_layers), chunks, range(plan.sender.tp_size)):
        for segment in plan.outgoing(rank, layer, *chunk, MAX_CELLS):
            payload = source.read(rank, segment)
            sent.append(SegmentRecord(segment, payload.numel(), checksum(payload)))
            channel = moving.senders[rank, segment.receiver_rank]
            staged = channel.stage(payload.numel(), lambda: True)
            assert staged is not None
            assert channel.put(Outgoing(Entry(KEY, sent[-1]), staged.copy_(payload), staged=True), lambda: True)
    return sent


def heads(num_kv_heads: int, dtype: str) -> KVLayout:
    return KVLayout("model", "f", 3, num_kv_heads, 8, 4, dtype)


@pytest.mark.parametrize(
    ("shape", "ours", "theirs"),
    [
        (heads(6, "float32"), 3, 2),
        (heads(4, "int8"), 4, 1),
        (heads(2, "bfloat16"), 1, 4),
        (heads(2, "float16"), 4, 2),
        (KVLayout("model", "f", 3, 1, 12, 4, "bfloat16", kind="latent"), 2, 3),
    ],
    ids=["3-to-2", "int8-4-to-1", "bfloat16-1-to-4", "float16-4-to-2", "latent-2-to-3"],
)
def test_every_rank_of_the_receiver_ends_with_the_values_of_the_whole_model(
    shape: KVLayout, ours: int, theirs: int
) -> None:
    plan = ReshardPlan(Group(shape, ours), Group(replace(shape, block_size=5), theirs))
    model, source, target = Ranks(Group(shape)), Ranks(plan.sender), Ranks(plan.receiver)
    fill(model, source)
    with links(plan, target) as moving:
        sent = send(plan, source, moving)
        assert {moving.arrived.get(timeout=WAIT_S) for _ in sent} == set(sent)
    assert plan.gap(CommitRecord(tuple(sent), NUM_TOKENS, NUM_SKIPPED)) is None
    for rank, layer in product(range(theirs), range(shape.num_layers)):
        held = target.all_of(rank, layer, NUM_SKIPPED)
        assert torch.equal(target.read(rank, held), model.read(0, held))
