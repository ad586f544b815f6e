"""The store over which two processes make a process group: what one side sets, the other gets."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed

dist: Any = torch.distributed  # its stubs leave out stores and the groups' own calls
_ITEM = struct.Struct("<II")  # bytes of key, bytes of value
MAX_ITEM_BYTES = 1 << 16


class PairStore(dist.Store):  # type: ignore[misc]
    """A store of two sides over one connection. Keys have one writer each; nothing is read ahead of need.

    Only what process groups of two ask for. Raises OSError where the peer goes away or says nothing in time.
    """

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        super().__init__()
        self._connection, self._timeout_s = connection, timeout_s
        self._lock = threading.Lock()
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:
        data = key.encode()
        with self._lock:
            self._values[key] = value
            self._connection.settimeout(self._timeout_s)
            self._connection.sendall(_ITEM.pack(len(data), len(value)) + data + value)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._values[key]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        with self._lock:
            self._connection.settimeout(timeout.total_seconds() if timeout else self._timeout_s)
            while not all(key in self._values for key in keys):
                self._take()

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all are known here already."""
        return all(key in self._values for key in keys)

    def _take(self) -> None:
        key_bytes, value_bytes = _ITEM.unpack(receive_exactly(self._connection, _ITEM.size))
        if key_bytes + value_bytes > MAX_ITEM_BYTES:
            raise OSError(f"the peer sets {key_bytes + value_bytes} bytes")
        key = receive_exactly(self._connection, key_bytes).decode(errors="replace")
        self._values[key] = receive_exactly(self._connection, value_bytes)


def receive_exactly(connection: socket.socket, num_bytes: int) -> bytes:
    """Raises OSError where the peer closes before."""
    data = b""
    while len(data) < num_bytes:
        if not (part := connection.recv(num_bytes - len(data))):
            raise OSError("the peer closed the connection")
        data += part
    return data
