"""A worker's KV plane in a process of its own, to be stopped or killed; it obeys what comes through a pipe."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from core.messages import Connect, PairDown, PairUp
from core.ticket import AttemptKey, Ticket
from kv_transfer.config import TransferConfig
from tests.kv_transfer.harness import WAIT_S, Worker, layout

START_S = 60.0
"""A new process imports torch; later ones are forked from one that has."""


def serve(name: str, config: TransferConfig, pipe: Connection) -> None:
    """Send the address, obey each Connect until its pair is up or down, send what it is told, and end with the pipe."""
    torch.set_num_threads(1)
    worker = Worker(name, layout(), config)
    pipe.send(worker.plane.address)
    try:
        while True:
            match pipe.recv():
                case Connect() as command:
                    worker.plane.connect(command)
                    event = worker.events.get(timeout=WAIT_S)
                    assert isinstance(event, PairUp | PairDown)
                    pipe.send(isinstance(event, PairUp))
                case Ticket() as ticket:
                    worker.plane.sender.begin(ticket)
                case Push(key, layer, num_tokens):
                    worker.plane.sender.push(key, layer, 0, num_tokens, range(num_tokens))
    except EOFError:
        pass
    finally:
        worker.plane.close()


@dataclass(frozen=True, slots=True)
class Push:
    """One layer of the first tokens of some blocks of its own leaves."""

    key: AttemptKey
    layer: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Peer:
    name: str
    address: str
    pid: int
    pipe: Connection

    def connect(self, command: Connect) -> None:
        """Returns at once; `is_up` waits for the outcome."""
        self.pipe.send(command)

    def tell(self, command: Ticket | Push) -> None:
        """Returns at once; one that is stopped obeys when it goes on."""
        self.pipe.send(command)

    def is_up(self) -> bool:
        assert self.pipe.poll(WAIT_S)
        return bool(self.pipe.recv())

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


@contextmanager
def peer(name: str, config: TransferConfig) -> Iterator[Peer]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.kv_transfer.harness"])
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(name, config, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.poll(START_S)
        assert process.pid is not None
        yield Peer(name, ours.recv(), process.pid, ours)
    finally:
        process.kill()
        process.join(WAIT_S)
        ours.close()
