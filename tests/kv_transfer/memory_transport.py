"""Pairs that meet in memory: the same order, blocking and failures as process groups, and a hook that damages bytes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import TransferError
from core.messages import Connect
from kv_transfer.rendezvous import SENDER

Damage = Callable[[Tensor], Tensor]
"""What comes of a message of bytes on its way."""


def _unharmed(message: Tensor) -> Tensor:
    return message


class Wire:
    """One direction: messages leave when they are taken."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.broken = False
        self.damage: Damage = _unharmed
        self._held = False
        self._messages: deque[Tensor] = deque()
        self._num_sent = self._num_taken = 0

    def send(self, message: Tensor) -> int:
        """Its number."""
        with self.changed:
            self._messages.append(self.damage(message.clone()))
            self._num_sent += 1
            self.changed.notify_all()
            return self._num_sent

    def until_taken(self, number: int, timeout_s: float) -> None:
        with self.changed:
            self._wait(lambda: self._num_taken >= number, timeout_s)

    def receive(self, into: Tensor, timeout_s: float) -> None:
        with self.changed:
            self._wait(lambda: self._messages and not self._held, timeout_s)
            if into.numel() != self._messages[0].numel():
                self.broken = True
                self.changed.notify_all()
                raise TransferError("pair_down", "the message is of another size")
            into.copy_(self._messages.popleft())
            self._num_taken += 1
            self.changed.notify_all()

    def hold(self, held: bool) -> None:
        """While held nothing arrives; what was being sent waits."""
        with self.changed:
            self._held = held
            self.changed.notify_all()

    def until_sending(self, timeout_s: float) -> bool:
        """Whether something is on its way before `timeout_s`."""
        with self.changed:
            return self.changed.wait_for(lambda: bool(self._messages), timeout_s)

    def break_(self) -> None:
        with self.changed:
            self.broken = True
            self.changed.notify_all()

    def _wait(self, done: Callable[[], object], timeout_s: float) -> None:
        self.changed.wait_for(lambda: done() or self.broken, timeout_s)
        if self.broken or not done():
            self.broken = True
            self.changed.notify_all()
            raise TransferError("pair_down", "the wire is broken")


@dataclass(frozen=True, slots=True)
class Message:
    wire: Wire
    number: int

    def wait(self, timeout_s: float) -> None:
        self.wire.until_taken(self.number, timeout_s)


class MemoryTransport:
    """One end of two wires."""

    def __init__(self, outward: Wire, inward: Wire) -> None:
        self.name, self.payload_device = "memory", torch.device("cpu")
        self.memory: Tensor | None = None
        self._outward, self._inward = outward, inward

    def send(self, frame: Tensor, parts: Sequence[Tensor], timeout_s: float) -> Message:
        return Message(self._outward, [self._outward.send(each) for each in (frame, *parts)][-1])

    def receive_frame(self, frame: Tensor, timeout_s: float) -> None:
        self._inward.receive(frame, timeout_s)

    def receive_parts(self, sizes: Sequence[int], timeout_s: float) -> Iterator[Tensor]:
        for size in sizes:
            part = torch.empty(size, dtype=torch.uint8)
            self._inward.receive(part, timeout_s)
            yield part

    def abort(self) -> None:
        self._outward.break_()
        self._inward.break_()


class MemoryNetwork:
    """Where workers of one process meet. `to_receiver[epoch]` is the wire that carries the segments."""

    def __init__(self) -> None:
        self.to_receiver: dict[int, Wire] = {}
        self._changed = threading.Condition()
        self._waiting: dict[tuple[str, str, int], dict[int, MemoryTransport]] = {}

    def rendezvous(self, address: str, timeout_s: float) -> MemoryRendezvous:
        return MemoryRendezvous(self, address, timeout_s)

    def meet(self, connect: Connect, rank: int, timeout_s: float) -> MemoryTransport:
        name = (connect.prefill_incarnation, connect.decode_incarnation, connect.epoch)
        with self._changed:
            if name not in self._waiting:
                there, back = Wire(), Wire()
                self.to_receiver[connect.epoch] = there
                self._waiting[name] = {SENDER: MemoryTransport(there, back), 1 - SENDER: MemoryTransport(back, there)}
            transport = self._waiting[name].pop(rank)
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: not self._waiting[name], timeout_s):
                raise TransferError("pair_down", "the peer did not come")
            return transport


class MemoryRendezvous:
    def __init__(self, network: MemoryNetwork, address: str, timeout_s: float) -> None:
        self.address = address
        self._network, self._timeout_s = network, timeout_s

    def meet(self, connect: Connect, rank: int) -> MemoryTransport:
        return self._network.meet(connect, rank, self._timeout_s)

    def close(self) -> None:
        """Nothing to let go of."""
