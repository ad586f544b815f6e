"""Messages over one stream socket: a frame, then what says where its payload is, or the payload itself."""

from __future__ import annotations

import contextlib
import socket
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.errors import TransferError
from kv_transfer.transport import Delivery

DONE = b"d"
_MORE = getattr(socket, "MSG_MORE", 0)  # where there is none, a frame may travel in a packet of its own


class SocketTransport(ABC):
    """One end. The receiver says of each message when it is done with it, before it waits for another or sends one."""

    name: str
    payload_device = torch.device("cpu")

    def __init__(self, connection: socket.socket, memory: Tensor | None) -> None:
        self._connection, self.memory = connection, memory
        self._aborted = threading.Event()
        self._num_sent = self._num_done = 0
        self._owes = False  # the word that what was received last is done with
        weakref.finalize(self, connection.close)

    @abstractmethod
    def receive_parts(self, sizes: Sequence[int], timeout_s: float) -> Iterator[Tensor]:
        """As `Transport.receive_parts`."""

    @abstractmethod
    def _parts(self, parts: Sequence[Tensor]) -> list[memoryview | bytes]:
        """What goes behind a frame."""

    def send(self, frame: Tensor, parts: Sequence[Tensor], timeout_s: float) -> Delivery:
        message = [as_bytes(frame), *self._parts(parts)]
        self._num_sent += 1
        with self._reasons(timeout_s):
            self._give_back()
            for i, piece in enumerate(message, start=1):
                self._connection.sendall(piece, _MORE if i < len(message) else 0)
        return _Message(self, self._num_sent)

    def receive_frame(self, frame: Tensor, timeout_s: float) -> None:
        with self._reasons(timeout_s):
            self._give_back()
            self._receive(as_bytes(frame))
            self._owes = True

    def wait(self, number: int, timeout_s: float) -> None:
        """Until the peer is done with that message."""
        answer = bytearray(1)
        while self._num_done < number:
            with self._reasons(timeout_s):
                self._receive(memoryview(answer))
                if answer != DONE:
                    raise TransferError("pair_down", "the peer says what it should not")
            self._num_done += 1

    def abort(self) -> None:
        self._aborted.set()
        with contextlib.suppress(OSError):  # it has ended already
            self._connection.shutdown(socket.SHUT_RDWR)

    def _give_back(self) -> None:
        if self._owes:
            self._owes = False
            self._connection.sendall(DONE)

    def _receive(self, into: memoryview) -> None:
        while into:
            if not (num_bytes := self._connection.recv_into(into)):
                raise OSError("the peer closed the connection")
            into = into[num_bytes:]

    @contextlib.contextmanager
    def _reasons(self, timeout_s: float) -> Iterator[None]:
        """Failures become TransferErrors, and break the connection."""
        try:
            self._connection.settimeout(timeout_s)
            yield
        except (OSError, TransferError) as error:
            reason = "the channel was aborted" if self._aborted.is_set() else str(error) or type(error).__name__
            self.abort()
            raise TransferError("pair_down", reason) from error


@dataclass(frozen=True, slots=True)
class _Message:
    """The message of that number."""

    transport: SocketTransport
    number: int

    def wait(self, timeout_s: float) -> None:
        self.transport.wait(self.number, timeout_s)


class TCPTransport(SocketTransport):
    """Payload follows its frame; the connection is the one over which the two met. For CPUs of two hosts."""

    name = "tcp"

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection, None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._staging = torch.empty(0, dtype=torch.uint8)

    def receive_parts(self, sizes: Sequence[int], timeout_s: float) -> Iterator[Tensor]:
        """Each lies where the one before lay, so that it stays in the caches; the kernel takes in the ones to come."""
        if max(sizes, default=0) > self._staging.numel():
            self._staging = torch.empty(max(sizes), dtype=torch.uint8)
        for size in sizes:
            part = self._staging[:size]
            with self._reasons(timeout_s):
                self._receive(as_bytes(part))
            yield part

    def _parts(self, parts: Sequence[Tensor]) -> list[memoryview | bytes]:
        return [as_bytes(part) for part in parts]


def as_bytes(data: Tensor) -> memoryview:
    """[N] uint8 on CPU, as it lies there."""
    array: Any = data.numpy()
    return memoryview(array)
