"""A prefill worker's KV plane in a process of its own, whose payload can be damaged after its checksum was taken."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch
from torch import Tensor

from core.messages import Connect, PairDown, PairUp
from core.ticket import CommitRecord, Ticket
from kv_transfer.config import TransferConfig
from kv_transfer.rendezvous import GroupRendezvous, Rendezvous
from kv_transfer.transport import Delivery, Transport
from tests.kv_transfer.harness import HOST, WAIT_S, Worker, layout

START_S = 60.0
Harm = Literal["", "flip", "zeros", "short"]
"""Nothing; one bit turns; the second half never came; the last word is not sent."""
NUM_TOKENS = 10


@dataclass(frozen=True, slots=True)
class Send:
    """Send the KV of `blocks`; what is to happen to its first segment."""

    ticket: Ticket
    blocks: tuple[int, ...]
    harm: Harm = ""


class HarmfulTransport:
    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self.harm: Harm = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def send(self, frame: Tensor, parts: Sequence[Tensor], timeout_s: float) -> Delivery:
        if parts:
            harm, self.harm = self.harm, ""
            first = parts[0]
            match harm:
                case "flip":
                    first[first.numel() // 2] ^= 4
                case "zeros":
                    first[first.numel() // 2 :] = 0
                case "short":
                    parts = (first[:-4], *parts[1:])
        return self._inner.send(frame, parts, timeout_s)


class HarmfulRendezvous:
    def __init__(self, inner: Rendezvous) -> None:
        self._inner = inner
        self.transport: HarmfulTransport | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def meet(self, connect: Connect, rank: int) -> Any:
        self.transport = HarmfulTransport(self._inner.meet(connect, rank))
        return self.transport


def serve(name: str, config: TransferConfig, pipe: Connection) -> None:
    """Obey each Connect and Send, and answer it with whether the pair is up, or with record and payloads."""
    torch.set_num_threads(1)
    rendezvous = HarmfulRendezvous(GroupRendezvous(HOST, torch.device("cpu"), config))
    worker = Worker(name, layout(), config, rendezvous=rendezvous)
    pipe.send(None)
    try:
        while True:
            match pipe.recv():
                case Connect() as command:
                    worker.plane.connect(command)
                    pipe.send(_is_up(worker, command.epoch))
                case Send() as command:
                    assert rendezvous.transport is not None
                    rendezvous.transport.harm = command.harm
                    pipe.send(_send(worker, command))
    except EOFError:
        pass
    finally:
        worker.plane.close()


def _is_up(worker: Worker, epoch: int) -> bool:
    """Once it is known; what is told of older epochs is passed over."""
    while True:
        event = worker.events.get(timeout=WAIT_S)
        if isinstance(event, PairUp | PairDown) and event.epoch == epoch:
            return isinstance(event, PairUp)


def _send(worker: Worker, command: Send) -> tuple[CommitRecord, list[bytes]]:
    sender, key = worker.plane.sender, command.ticket.key
    sender.begin(command.ticket)
    for layer in range(worker.layout.num_layers):
        sender.push(key, layer, 0, NUM_TOKENS, command.blocks)
    record = sender.commit(key, [0] * NUM_TOKENS)
    layers = range(worker.layout.num_layers)
    return record, [worker.storage.read(i, command.blocks, 0, NUM_TOKENS).numpy().tobytes() for i in layers]


@dataclass(frozen=True, slots=True)
class Source:
    name: str
    pipe: Connection

    def connect(self, command: Connect) -> bool:
        return bool(self._ask(command))

    def send(self, command: Send) -> tuple[CommitRecord, list[bytes]]:
        record, payloads = self._ask(command)
        return record, payloads

    def _ask(self, command: object) -> Any:
        self.pipe.send(command)
        assert self.pipe.poll(WAIT_S)
        return self.pipe.recv()


@contextmanager
def source(name: str, config: TransferConfig) -> Iterator[Source]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.kv_transfer.harness"])
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(name, config, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.poll(START_S)
        ours.recv()
        yield Source(name, ours)
    finally:
        process.kill()
        process.join(WAIT_S)
        ours.close()
