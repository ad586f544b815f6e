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
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.errors import IntegrityError, TransferError
from kv_transfer.socket_transport import DONE, SocketTransport

_PLACE = struct.Struct("<QQ")  # offset and bytes of payload
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


class SharedMemoryTransport(SocketTransport):
    """Behind a frame goes where its payload lies. `memory` is the sender's: all payload must lie there."""

    name = "shm"

    def __init__(self, connection: socket.socket, region: Tensor, *, sends: bool) -> None:
        """`region`: [N] uint8."""
        super().__init__(connection, region if sends else None)
        self._region = region

    def receive_parts(self, sizes: Sequence[int], timeout_s: float) -> Iterator[Tensor]:
        places = bytearray(_PLACE.size * len(sizes))
        with self._reasons(timeout_s):
            self._receive(memoryview(places))
            parts = [self._part(*place) for place in _PLACE.iter_unpack(places)]
        return iter(parts)

    def _part(self, offset: int, size: int) -> Tensor:
        if offset + size > self._region.numel():
            raise TransferError("corrupt_frame", f"{size} bytes at {offset} are not within the memory that is shared")
        return self._region[offset : offset + size]

    def _parts(self, parts: Sequence[Tensor]) -> list[memoryview | bytes]:
        return [b"".join(map(self._place, parts))] if parts else []

    def _place(self, part: Tensor) -> bytes:
        offset = part.data_ptr() - self._region.data_ptr()
        if not 0 <= offset <= self._region.numel() - part.numel():
            raise IntegrityError("payload lies outside of the memory that is shared")
        return _PLACE.pack(offset, part.numel())


class Invitation:
    """The sender's side of the meeting: `address` is where the receiver comes for the memory."""

    def __init__(self, num_bytes: int) -> None:
        """`num_bytes`: what may be staged at once."""
        self._num_bytes = num_bytes
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
                socket.send_fds(connection, [DONE], [descriptor])
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
