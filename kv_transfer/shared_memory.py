"""Payload between two workers of one host: the sender writes it once, the receiver copies it out of there.

The memory has no name, so nothing is left of it when both are gone, however they end. The sender owns it and alone can
write it; it can't be made smaller under the receiver, and it isn't used again before the receiver says that it is done.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import socket
import struct
import sys
import threading
import weakref
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.errors import TransferError
from kv_transfer.frame import MAX_PAYLOAD_BYTES

_PLACE = struct.Struct("<QQ")  # offset and bytes of payload
_TAKEN, _DONE = b"t", b"d"
_SEALS = 0 if sys.platform != "linux" else fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@cache
def host_identity() -> str:
    """Equal in processes that can share memory by this module, and in no others; empty where it can't be done."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = Path("/proc/self/ns/net").stat()
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as trial:
            trial.bind(_new_address())
        os.close(_new_memory(mmap.PAGESIZE))
    except (OSError, AttributeError):
        return ""
    return f"{boot}/{namespace.st_dev}:{namespace.st_ino}/{os.getuid()}"


class SharedMemoryTransport:
    """One end. Frames, and where payload lies, go over a Unix socket of the two.

    A frame has left when it is in the socket; that the peer took it is made sure of before the next one, or the
    payload. `memory` is the sender's to stage payload in: such payload is not copied again.
    """

    name = "shm"
    payload_device = torch.device("cpu")

    def __init__(self, connection: socket.socket, region: Tensor, *, sends: bool) -> None:
        """`region`: [N + MAX_PAYLOAD_BYTES] uint8, the last of it for payload that was not staged."""
        self._connection, self._region = connection, region
        self.memory: Tensor | None = region[:-MAX_PAYLOAD_BYTES] if sends else None
        self._aborted = threading.Event()
        self._owed = b""  # what the peer has yet to say
        self._using = False  # the payload that was received last
        weakref.finalize(self, connection.close)

    def send_frame(self, frame: Tensor, timeout_s: float) -> None:
        with self._reasons(timeout_s):
            self._settle()
            self._connection.sendall(_bytes(frame))
            self._owed = _TAKEN

    def receive_frame(self, frame: Tensor, timeout_s: float) -> None:
        with self._reasons(timeout_s):
            self._give_back()
            self._settle()
            self._receive(_bytes(frame))
            self._connection.sendall(_TAKEN)

    def send_payload(self, payload: Tensor, timeout_s: float) -> None:
        offset = payload.data_ptr() - self._region.data_ptr()
        if not 0 <= offset <= self._region.numel() - payload.numel():
            offset = self._region.numel() - MAX_PAYLOAD_BYTES
            self._region[offset : offset + payload.numel()].copy_(payload)
        with self._reasons(timeout_s):
            self._connection.sendall(_PLACE.pack(offset, payload.numel()))
            self._owed += _DONE
            self._settle()

    def receive_payload(self, num_bytes: int, timeout_s: float) -> Tensor:
        place = bytearray(_PLACE.size)
        with self._reasons(timeout_s):
            self._receive(memoryview(place))
        offset, announced = _PLACE.unpack(place)
        if announced != num_bytes or offset + num_bytes > self._region.numel():
            raise TransferError("corrupt_frame", f"{announced} bytes at {offset} are not the {num_bytes} of the frame")
        self._using = True
        return self._region[offset : offset + num_bytes]

    def abort(self) -> None:
        self._aborted.set()
        with contextlib.suppress(OSError):  # it has ended already
            self._connection.shutdown(socket.SHUT_RDWR)

    def _give_back(self) -> None:
        if self._using:
            self._using = False
            self._connection.sendall(_DONE)

    def _settle(self) -> None:
        """Wait for what the peer owes."""
        answer = bytearray(len(self._owed))
        self._receive(memoryview(answer))
        if answer != self._owed:
            raise TransferError("pair_down", "the peer says what it should not")
        self._owed = b""

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


def _bytes(frame: Tensor) -> memoryview:
    array: Any = frame.numpy()
    return memoryview(array)


class Invitation:
    """The sender's side of the meeting: `address` is where the receiver comes for the memory."""

    def __init__(self, num_bytes: int) -> None:
        """`num_bytes`: what may be staged at once."""
        self._num_bytes = num_bytes + MAX_PAYLOAD_BYTES
        self.address = _new_address()
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(self.address)
        self.socket.listen(1)

    def accept(self, timeout_s: float) -> SharedMemoryTransport:
        """Raises OSError where nobody comes, or a process of another user."""
        self.socket.settimeout(timeout_s)
        connection, _ = self.socket.accept()
        try:
            _check_user(connection)
            descriptor = _new_memory(self._num_bytes)
            try:
                memory = mmap.mmap(descriptor, self._num_bytes)
                connection.settimeout(timeout_s)
                socket.send_fds(connection, [_TAKEN], [descriptor])
            finally:
                os.close(descriptor)
        except BaseException:
            connection.close()
            raise
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        return SharedMemoryTransport(connection, torch.frombuffer(memory, dtype=torch.uint8), sends=True)


def visit(connection: socket.socket, address: bytes, timeout_s: float) -> SharedMemoryTransport:
    """The receiver's side; `connection`: a new Unix socket. Raises OSError where there is no memory to be had."""
    connection.settimeout(timeout_s)
    connection.connect(address)
    _check_user(connection)
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
    if not descriptors:
        raise OSError("the peer sent no memory")
    try:
        if fcntl.fcntl(descriptors[0], fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise OSError("the peer's memory may shrink")
        memory = mmap.mmap(descriptors[0], os.fstat(descriptors[0]).st_size, prot=mmap.PROT_READ)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    if len(memory) <= MAX_PAYLOAD_BYTES:
        raise OSError(f"the peer's memory has {len(memory)} bytes")
    return SharedMemoryTransport(connection, _ReadOnly(memory).tensor(), sends=False)


class _ReadOnly:
    """A mapping that must not be written, as a tensor: torch has none such, and warns where it is given one."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._bytes = np.frombuffer(memory, np.uint8)  # keeps the mapping
        self.__array_interface__: dict[str, Any] = {
            **self._bytes.__array_interface__,
            "data": (self._bytes.ctypes.data, False),
        }

    def tensor(self) -> Tensor:
        return torch.from_numpy(np.asarray(self))


def _new_address() -> bytes:
    """An abstract address, which no file stands for and nobody can guess."""
    return b"\0penstock-" + secrets.token_hex(16).encode()


def _new_memory(num_bytes: int) -> int:
    """A descriptor of anonymous memory of that size for good."""
    descriptor = os.memfd_create("penstock-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, num_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check_user(connection: socket.socket) -> None:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    if user != os.getuid():
        raise OSError(f"a process of user {user} came")
